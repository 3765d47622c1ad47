use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use wire::{
    control::StepRule,
    revision::{Clause, Plan},
};

use super::*;

type Values = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// One rank, and its agent's way to a store of this process.
struct Node {
    store: Values,
    here: BTreeSet<u32>,
    answer: Result<(), No>,
    /// What its rank was told of registers.
    told: Mutex<Vec<(String, Vec<u8>)>>,
    /// After how many operations the agent is killed.
    lives: AtomicUsize,
}

impl Node {
    fn of(store: &Values, rank: u32) -> Self {
        let (store, here) = (store.clone(), BTreeSet::from([rank]));
        Self { store, here, answer: Ok(()), told: Mutex::default(), lives: AtomicUsize::new(usize::MAX) }
    }

    fn refusing(self, no: No) -> Self {
        Self { answer: Err(no), ..self }
    }

    fn killed_after(self, operations: usize) -> Self {
        Self { lives: AtomicUsize::new(operations), ..self }
    }

    /// A killed agent does nothing more, and says nothing.
    async fn live(&self) {
        if self.lives.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err() {
            std::future::pending().await
        }
    }

    fn give(&self, key: String, value: Vec<u8>) -> Vec<u8> {
        self.store.lock().unwrap().entry(key).or_insert(value).clone()
    }

    /// The rank comes to where the proposal begins: whether it begins here; `None`: it was told of none.
    fn decides(&self) -> Option<bool> {
        let (key, commit) = self.told.lock().unwrap().last().cloned()?;
        Some(self.give(key, ABANDONED.to_vec()) == commit)
    }
}

impl Job for Node {
    fn here(&self) -> &BTreeSet<u32> {
        &self.here
    }

    async fn settle(&self, key: String, value: Vec<u8>) -> Result<Vec<u8>, String> {
        self.live().await;
        Ok(self.give(key, value))
    }

    async fn wait_for(&self, key: String, limit: Duration) -> Result<Option<Vec<u8>>, String> {
        self.live().await;
        let end = Instant::now() + limit;
        loop {
            let value = self.store.lock().unwrap().get(&key).cloned();
            if value.is_some() || Instant::now() >= end {
                return Ok(value);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn prepare(&self, _: &Proposal, place: Place) -> Result<(), No> {
        self.live().await;
        let Place::Store { key, commit } = place else { panic!() };
        if self.answer.is_ok() {
            self.told.lock().unwrap().push((key, commit));
        }
        self.answer.clone()
    }
}

fn agent(name: &str, key: &str) -> Agent {
    Agent { name: name.into(), since: 0, key: Key::of(key), group: 7 }
}

fn proposal(revision: u64) -> Proposal {
    let clauses = vec![Clause { id: 1, text: "layers.*.mlp".into() }];
    Proposal { plan: Plan { revision, clauses, last_id: 9 }, base: Some(0), rule: StepRule::Optimizer, begins: Some(9) }
}

/// Follows the first revision once it is announced.
async fn follows(agent: &Agent, node: &Node) -> Result<Option<Proposal>, String> {
    let sealed = node.wait_for(announced(1), Duration::from_secs(60)).await?.ok_or("nothing is announced")?;
    agent.follow(node, 1, &sealed).await
}

/// A bound in which every agent has its answer.
const BOUND: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn all_nodes_begin_what_all_have_confirmed() {
    let store = Values::default();
    let (left, right) = (Node::of(&store, 0), Node::of(&store, 1));
    let (one, other) = (agent("one", "k"), agent("other", "k"));
    let next = proposal(1);
    let (led, followed) = tokio::join!(one.lead(&left, 2, &next), follows(&other, &right));
    assert_eq!((led, followed), (Ok(Ok(())), Ok(Some(next.clone()))));
    assert_eq!((left.decides(), right.decides()), (Some(true), Some(true)));
    assert_eq!(follows(&one, &left).await, Ok(Some(next)), "whoever leads hears of it as others do");
    assert_eq!(left.told.lock().unwrap().len(), 1, "and asks its ranks once");
    assert_eq!(one.next(&left, 0).await, Ok(2));
    assert_eq!(one.next(&left, 1).await, Ok(2));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_told_to_whoever_asked_and_nobody_begins() {
    for (no, expected) in [
        (No::Refused("rank 1 is past step 9".into()), Ok(Err("rank 1 is past step 9".into()))),
        (No::Lost("rank 1 has left".into()), Err("rank 1 has left".into())),
    ] {
        let store = Values::default();
        let (left, right) = (Node::of(&store, 0), Node::of(&store, 1).refusing(no));
        let (one, other) = (agent("one", "k"), agent("other", "k"));
        let next = proposal(1);
        let (led, followed) = tokio::join!(one.lead(&left, 2, &next), follows(&other, &right));
        assert_eq!((led, followed, left.decides()), (expected, Ok(None), Some(false)));
    }
}

#[tokio::test(start_paused = true)]
async fn ranks_that_nobody_speaks_for_are_named() {
    let store = Values::default();
    let left = Node::of(&store, 0);
    let why = agent("one", "k").lead(&left, 3, &proposal(1)).await.unwrap_err();
    assert!(why.starts_with("ranks 1, 2 have not confirmed"), "{why}");
    assert_eq!(left.decides(), Some(false));
}

#[tokio::test(start_paused = true)]
async fn a_rank_that_comes_first_abandons_it() {
    let store = Values::default();
    let left = Node::of(&store, 0);
    let (one, next) = (agent("one", "k"), proposal(1));
    let comes = async {
        while left.decides().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(left.decides(), Some(false));
        let (key, right) = (confirmed(1, 1), Confirmed { ranks: vec![1], answer: Ok(()) });
        left.give(key.clone(), one.seal(&key, &right).unwrap());
    };
    let (led, ()) = tokio::join!(one.lead(&left, 2, &next), comes);
    assert_eq!(led, Ok(Err("a rank came to step 9 before all had confirmed".into())));
}

#[tokio::test(start_paused = true)]
async fn of_two_that_would_lead_one_does_and_the_other_is_told() {
    let store = Values::default();
    let (left, right) = (Node::of(&store, 0), Node::of(&store, 1));
    let (one, other) = (agent("one", "k"), agent("other", "k"));
    let next = proposal(1);
    let (led, told, followed) =
        tokio::join!(one.lead(&left, 2, &next), other.lead(&right, 2, &next), follows(&other, &right));
    assert_eq!((led, followed), (Ok(Ok(())), Ok(Some(next.clone()))));
    assert!(told.unwrap_err().contains("another agent, one, is changing the hooks (revision 1)"));
    let undecided = Values::default();
    let left = Node::of(&undecided, 0);
    left.give(announced(1), one.seal(&announced(1), &one.announces(next)).unwrap());
    assert!(other.next(&left, 1).await.unwrap_err().contains("another agent, one,"));
    assert!(other.next(&left, 0).await.unwrap_err().contains("another agent, one,"));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_signed_with_the_key_begins_nothing() {
    let store = Values::default();
    let (left, right) = (Node::of(&store, 0), Node::of(&store, 1));
    let (one, stranger) = (agent("one", "k"), agent("stranger", "another"));
    let next = proposal(1);
    let (led, followed) = tokio::join!(one.lead(&left, 2, &next), follows(&stranger, &right));
    assert!(led.unwrap_err().contains("rank 1 has not confirmed"));
    assert!(followed.unwrap_err().contains("not signed"));
    assert_eq!((left.decides(), right.decides()), (Some(false), None));
    // Of another place, or another process group.
    let sealed = one.seal(&announced(1), &1u64).unwrap();
    assert_eq!(one.open::<u64>(&announced(1), &sealed), Some(1));
    assert_eq!(one.open::<u64>(&announced(2), &sealed), None);
    assert_eq!(Agent { group: 8, ..one.clone() }.open::<u64>(&announced(1), &sealed), None);
    assert_eq!(one.open::<u64>(&announced(1), b"short"), None);
}

/// Wherever an agent is killed, the ranks that were told decide alike, and the other agent says what they do.
#[tokio::test(start_paused = true)]
async fn an_agent_that_is_killed_anywhere_leaves_one_answer() {
    for kills_leader in [true, false] {
        for operations in 0..8 {
            let store = Values::default();
            let (left, right) = (Node::of(&store, 0), Node::of(&store, 1));
            let (left, right) = if kills_leader {
                (left.killed_after(operations), right)
            } else {
                (left, right.killed_after(operations))
            };
            let (one, other, next) = (agent("one", "k"), agent("other", "k"), proposal(1));
            let lead = tokio::time::timeout(BOUND, one.lead(&left, 2, &next));
            let follow = tokio::time::timeout(2 * BOUND, follows(&other, &right));
            let (led, followed) = tokio::join!(lead, follow);
            let at = format!("leader {kills_leader}, after {operations} operations");
            if kills_leader {
                assert!(followed.is_ok(), "{at}: whoever follows has an answer");
            } else {
                assert!(led.is_ok(), "{at}: whoever asked has an answer");
            }
            let begins: Vec<bool> = [left.decides(), right.decides()].into_iter().flatten().collect();
            assert!(begins.iter().all(|each| *each == begins[0]), "{at}");
            if let Ok(led) = led {
                assert_eq!(led == Ok(Ok(())), begins == [true, true], "{at}");
            }
            if let Ok(Ok(followed)) = followed {
                assert_eq!(followed.is_some(), begins == [true, true], "{at}");
            }
        }
    }
}
