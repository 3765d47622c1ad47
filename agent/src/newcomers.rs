//! Connections that have not shown yet who they are: bounded in number and in time.
//!
//! If one more comes than there may be, the one that has waited longest goes. To refuse the new one instead would let
//! whoever came first, and says nothing, keep everybody out.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// The connections of one listener.
#[derive(Debug)]
pub struct Newcomers {
    places: Arc<Semaphore>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    /// Oldest first.
    pushed: BTreeMap<u64, Arc<Notify>>,
}

/// One of them. Dropped when it has shown who it is, or with its connection.
#[derive(Debug)]
pub struct Newcomer {
    among: Arc<Newcomers>,
    number: u64,
    pushed: Arc<Notify>,
    _place: OwnedSemaphorePermit,
}

impl Newcomers {
    /// At most `limit` at a time.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { places: Arc::new(Semaphore::new(limit)), waiting: Mutex::default() })
    }

    /// Takes one more in. Waits for no more than that the connection which goes for it is closed.
    pub async fn admit(self: &Arc<Self>) -> Newcomer {
        let place = match self.places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(_) => {
                self.push_out();
                // The semaphore is never closed.
                self.places.clone().acquire_owned().await.expect("an open semaphore")
            }
        };
        let pushed = Arc::new(Notify::new());
        let mut waiting = self.waiting();
        let number = waiting.next;
        waiting.next += 1;
        waiting.pushed.insert(number, pushed.clone());
        drop(waiting);
        Newcomer { among: self.clone(), number, pushed, _place: place }
    }

    fn push_out(&self) {
        if let Some((_, oldest)) = self.waiting().pushed.pop_first() {
            oldest.notify_one();
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Newcomer {
    /// Comes true when it has been pushed out by a later one, or has waited for `patience`.
    pub fn over(&self, patience: Duration) -> impl Future<Output = ()> + Send + use<> {
        let pushed = self.pushed.clone();
        async move { _ = tokio::time::timeout(patience, pushed.notified()).await }
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        self.among.waiting().pushed.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn is_over(newcomer: &Newcomer) -> bool {
        use futures_util::FutureExt;
        newcomer.over(LONG).now_or_never().is_some()
    }

    #[tokio::test]
    async fn the_one_that_has_waited_longest_goes_for_a_new_one() {
        let all = Newcomers::new(2);
        let (first, second) = (all.admit().await, all.admit().await);
        let third = tokio::spawn({
            let all = all.clone();
            async move { all.admit().await }
        });
        first.over(LONG).await;
        assert!(!third.is_finished() && !is_over(&second));
        drop(first);
        let third = third.await.unwrap();
        assert!(!is_over(&second) && !is_over(&third));
    }

    #[tokio::test]
    async fn who_has_shown_who_it_is_is_not_pushed_out() {
        let all = Newcomers::new(1);
        let known = all.admit().await;
        drop(known);
        let newcomer = all.admit().await;
        assert!(!is_over(&newcomer) && all.waiting().pushed.len() == 1);
        newcomer.over(Duration::ZERO).await;
    }
}
