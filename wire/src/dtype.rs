//! Element types of captured tensors.

use serde::{Deserialize, Serialize};

macro_rules! dtypes {
    ($( $variant:ident = $code:literal, $name:literal, $bytes:literal, $st:expr; )*) => {
        /// Element type of a tensor, as torch names it. The discriminant is the code on the wire.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum DType { $( #[serde(rename = $name)] $variant = $code, )* }

        impl DType {
            /// Every element type, in code order.
            pub const ALL: &'static [DType] = &[$( DType::$variant, )*];

            /// The type with this wire code.
            pub fn from_code(code: u8) -> Option<Self> {
                match code { $( $code => Some(Self::$variant), )* _ => None }
            }

            /// torch's name without the `torch.` prefix, such as `float32`.
            pub fn name(self) -> &'static str {
                match self { $( Self::$variant => $name, )* }
            }

            /// Bytes per element.
            pub fn size(self) -> usize {
                match self { $( Self::$variant => $bytes, )* }
            }

            /// The name in a safetensors header; `None` where the format has no such type
            /// (those are stored as bytes, with one more trailing dimension).
            pub fn safetensors(self) -> Option<&'static str> {
                match self { $( Self::$variant => $st, )* }
            }
        }
    };
}

dtypes! {
    Float64 = 1, "float64", 8, Some("F64");
    Float32 = 2, "float32", 4, Some("F32");
    Float16 = 3, "float16", 2, Some("F16");
    BFloat16 = 4, "bfloat16", 2, Some("BF16");
    Float8E4M3Fn = 5, "float8_e4m3fn", 1, Some("F8_E4M3");
    Float8E5M2 = 6, "float8_e5m2", 1, Some("F8_E5M2");
    Float8E4M3Fnuz = 7, "float8_e4m3fnuz", 1, None;
    Float8E5M2Fnuz = 8, "float8_e5m2fnuz", 1, None;
    Float8E8M0Fnu = 9, "float8_e8m0fnu", 1, Some("F8_E8M0");
    Int64 = 16, "int64", 8, Some("I64");
    Int32 = 17, "int32", 4, Some("I32");
    Int16 = 18, "int16", 2, Some("I16");
    Int8 = 19, "int8", 1, Some("I8");
    UInt64 = 20, "uint64", 8, Some("U64");
    UInt32 = 21, "uint32", 4, Some("U32");
    UInt16 = 22, "uint16", 2, Some("U16");
    UInt8 = 23, "uint8", 1, Some("U8");
    Bool = 24, "bool", 1, Some("BOOL");
    Complex64 = 32, "complex64", 8, Some("C64");
    Complex128 = 33, "complex128", 16, None;
    Complex32 = 34, "complex32", 4, None;
}

impl DType {
    /// The type with this torch name (`float32`; `torch.float32` is understood too).
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.strip_prefix("torch.").unwrap_or(name);
        Self::ALL.iter().copied().find(|d| d.name() == name)
    }

    /// Real floating point of any width.
    pub fn is_float(self) -> bool {
        (self as u8) < 16
    }

    /// Complex of any width.
    pub fn is_complex(self) -> bool {
        (self as u8) >= 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_round_trip() {
        for &dtype in DType::ALL {
            assert_eq!(DType::from_code(dtype as u8), Some(dtype));
            assert_eq!(DType::from_name(dtype.name()), Some(dtype));
        }
        assert_eq!(DType::from_code(0), None);
        assert_eq!(DType::from_name("torch.bfloat16"), Some(DType::BFloat16));
    }
}
