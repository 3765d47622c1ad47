//! When the slab is pinned for copies from a device.

/// A device is not always in use when the slab is made: pinning is tried then, and once more when a copy has come from
/// one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pinning {
    /// Copies from a device go at full speed.
    Pinned,
    /// No device was in use yet.
    NotYet,
    /// It was in use, and refused.
    Refused,
}

impl Pinning {
    /// The slab was made.
    pub fn new(pin: impl FnOnce() -> bool) -> Self {
        if pin() { Self::Pinned } else { Self::NotYet }
    }

    /// A copy came from a device. Whether it is now clear that it will stay slow.
    pub fn device_copied(&mut self, pin: impl FnOnce() -> bool) -> bool {
        if *self != Self::NotYet {
            return false;
        }
        *self = if pin() { Self::Pinned } else { Self::Refused };
        *self == Self::Refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slab_made_before_the_device_was_used_is_pinned_with_the_first_copy() {
        let mut pinning = Pinning::new(|| false);
        assert!(!pinning.device_copied(|| true));
        assert_eq!(pinning, Pinning::Pinned);
        assert!(!pinning.device_copied(|| false), "asked once more");
        assert_eq!(pinning, Pinning::Pinned);
    }

    #[test]
    fn a_device_that_refuses_is_reported_once() {
        let mut pinning = Pinning::new(|| false);
        assert!(pinning.device_copied(|| false));
        assert!(!pinning.device_copied(|| false), "said once more");
        assert!(!Pinning::new(|| true).device_copied(|| false));
    }
}
