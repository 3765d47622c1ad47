//! By how much a job scaled its loss before it went backward.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A finite factor as a rule. A scaler that grew too far has infinity, one that gave way too often 0, and one that was
/// broken not-a-number: that is what the job used, and no damage.
///
/// Not-a-number is equal to itself. In JSON a finite scale is a number; JSON has none for the others, which are `"inf"`,
/// `"-inf"` and `"nan"`.
#[derive(Clone, Copy, Debug)]
pub struct LossScale(pub f64);

impl LossScale {
    /// Of a loss that was not scaled.
    pub const ONE: Self = Self(1.0);

    /// The factor, if a gradient can be divided by it.
    pub fn divisor(self) -> Option<f64> {
        Some(self.0).filter(|scale| scale.is_finite() && *scale != 0.0)
    }
}

impl Default for LossScale {
    fn default() -> Self {
        Self::ONE
    }
}

impl PartialEq for LossScale {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits() || self.0.is_nan() && other.0.is_nan()
    }
}

impl Eq for LossScale {}

impl fmt::Display for LossScale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for LossScale {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            scale if scale.is_finite() => serializer.serialize_f64(scale),
            scale if scale.is_nan() => serializer.serialize_str("nan"),
            scale if scale > 0.0 => serializer.serialize_str("inf"),
            _ => serializer.serialize_str("-inf"),
        }
    }
}

impl<'de> Deserialize<'de> for LossScale {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Visitor)
    }
}

struct Visitor;

impl de::Visitor<'_> for Visitor {
    type Value = LossScale;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a loss scale: a number, \"inf\", \"-inf\" or \"nan\"")
    }

    fn visit_f64<E>(self, scale: f64) -> Result<LossScale, E> {
        Ok(LossScale(scale))
    }

    fn visit_u64<E>(self, scale: u64) -> Result<LossScale, E> {
        Ok(LossScale(scale as f64))
    }

    fn visit_i64<E>(self, scale: i64) -> Result<LossScale, E> {
        Ok(LossScale(scale as f64))
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<LossScale, E> {
        match name {
            "inf" => Ok(LossScale(f64::INFINITY)),
            "-inf" => Ok(LossScale(f64::NEG_INFINITY)),
            "nan" => Ok(LossScale(f64::NAN)),
            _ => Err(E::invalid_value(de::Unexpected::Str(name), &self)),
        }
    }

    /// What was written before scales that are no numbers had names.
    fn visit_unit<E>(self) -> Result<LossScale, E> {
        Ok(LossScale(f64::NAN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_equals_itself_and_no_other() {
        let all = [1.0, 65536.0, 0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN].map(LossScale);
        for (n, scale) in all.iter().enumerate() {
            for (m, other) in all.iter().enumerate() {
                assert_eq!(scale == other, n == m, "{scale} and {other}");
            }
        }
        assert_eq!(LossScale(f64::NAN), LossScale(-f64::NAN));
    }

    #[test]
    fn nothing_can_be_divided_by_zero_or_what_is_no_number() {
        for scale in [0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
            assert_eq!(LossScale(scale).divisor(), None, "{scale}");
        }
        assert_eq!(LossScale(0.5).divisor(), Some(0.5));
    }
}
