// The engine, as the table of its functions that the bridge was opened with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "flexmodel/wire.h"

namespace flexmodel {

// See ffi.rs.
bool set_host(size_t table);

// Not before the bridge was opened, which is before anything in it is called. None of its functions throws.
const HostTable& host();

// Borrows `text`.
inline Str str(std::string_view text) { return {reinterpret_cast<const uint8_t*>(text.data()), text.size()}; }

// Whether taps are on.
inline bool active() { return host().active(); }

// One line for the user.
inline void notice(const std::string& text) { host().notice(str(text)); }

// Turns taps off in this process, with one line.
inline void fault(const std::string& text) { host().fault(str(text)); }

// The number that crosses a boundary.
template <typename Enum>
constexpr uint8_t code(Enum value) {
  static_assert(sizeof(Enum) == 1);
  return static_cast<uint8_t>(value);
}

}  // namespace flexmodel
