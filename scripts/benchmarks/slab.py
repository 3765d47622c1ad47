"""Bytes a second into the slab against memcpy of the same bytes in the same process."""

import subprocess

from common import EXAMPLES, row, title

FRAMES = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "16 MiB": 16 << 20}


def main() -> None:
    title("slab: bytes a second into the slab / memcpy, while a thread makes room")
    for name, frame in FRAMES.items():
        out = subprocess.run([EXAMPLES / "slab_speed", str(frame), "15"], check=True, capture_output=True, text=True)
        pairs = [tuple(map(float, line.split())) for line in out.stdout.splitlines()]
        row(f"tensors of {name}", [slab / memcpy for slab, memcpy in pairs], ">= 0.9" if frame >= 1 << 20 else "")
        row(f"tensors of {name}: memcpy, GB/s", [memcpy for _, memcpy in pairs], form="{:.1f}")


if __name__ == "__main__":
    main()
