//! When the slab is pinned for copies from a device.

use std::sync::OnceLock;

/// The slab for tensors of a device is pinned with the first copy into it, on the thread that makes copies: it takes long,
/// and a device is in use then.
#[derive(Debug, Default)]
pub struct Pinning {
    pinned: OnceLock<bool>,
}

impl Pinning {
    /// A copy is about to be made. Whether it is now clear that it will be slow, and all others.
    pub fn before_copy(&self, pin: impl FnOnce() -> bool) -> bool {
        let mut asked = false;
        let pinned = self.pinned.get_or_init(|| {
            asked = true;
            pin()
        });
        asked && !pinned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slab_is_pinned_once_with_the_first_copy() {
        let pinning = Pinning::default();
        assert!(!pinning.before_copy(|| true));
        assert!(!pinning.before_copy(|| unreachable!("it is pinned already")));
    }

    #[test]
    fn a_device_that_refuses_is_reported_once() {
        let pinning = Pinning::default();
        assert!(pinning.before_copy(|| false));
        assert!(!pinning.before_copy(|| unreachable!("it was refused already")));
    }
}
