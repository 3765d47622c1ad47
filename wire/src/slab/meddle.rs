//! What the other side does between two looks at a slab. For tests and fuzz targets alone: no other build has it.

use std::cell::RefCell;

type Meddler = Box<dyn FnMut()>;

thread_local! {
    static MEDDLER: RefCell<Option<Meddler>> = const { RefCell::new(None) };
}

/// From now on `f` is called before each look at a slab on this thread; `None`: nothing is.
pub fn set(f: Option<Meddler>) {
    MEDDLER.with_borrow_mut(|meddler| *meddler = f);
}

/// A look is about to be taken.
pub(super) fn now() {
    // It may look itself.
    let Some(mut meddler) = MEDDLER.with_borrow_mut(Option::take) else { return };
    meddler();
    MEDDLER.with_borrow_mut(|place| _ = place.get_or_insert(meddler));
}
