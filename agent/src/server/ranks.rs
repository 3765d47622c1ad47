//! The ranks that are attached, each with the connection on which it can be asked something.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use flexmodel_run::format::JobId;
use tokio::sync::{mpsc, oneshot};
use wire::control::{self, FromAgent, MAX_QUESTIONS, Question};

use super::listed::Listed;

/// What a rank answers, no more of it than a run keeps.
pub type Answer = control::Answer<Listed<String>>;

/// Why a rank did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoAnswer {
    /// No such rank is attached.
    Absent,
    /// It left with the question.
    Left,
    /// It did not answer in time, or has not answered as many questions as may be open.
    Late,
}

/// What a rank is asked, with the descriptor that goes with it.
pub type Sent = (FromAgent, Option<Arc<OwnedFd>>);

/// A question on its way to the connection of a rank.
struct Asked {
    question: Question,
    fd: Option<Arc<OwnedFd>>,
    reply: oneshot::Sender<Answer>,
}

/// A rank of a job: several jobs may have one of a number.
pub type Who = (JobId, u32);

struct Peer {
    /// Tells this connection from the rank's others.
    connection: u64,
    questions: mpsc::Sender<Asked>,
    /// Of the hook plan that it has said it has.
    revision: Option<u64>,
}

#[derive(Default)]
struct Known {
    connections: u64,
    peers: BTreeMap<Who, Peer>,
}

/// The ranks that are attached, each by its last connection.
#[derive(Default)]
pub struct Ranks(Mutex<Known>);

impl std::fmt::Debug for Ranks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.lock().peers.keys()).finish()
    }
}

impl Ranks {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A rank is welcomed on a connection. What it is asked comes to that until it ends.
    pub fn join(self: &Arc<Self>, rank: Who) -> Questions {
        let (questions, asked) = mpsc::channel(MAX_QUESTIONS);
        let mut known = self.lock();
        known.connections += 1;
        let connection = known.connections;
        known.peers.insert(rank, Peer { connection, questions, revision: None });
        Questions { ranks: self.clone(), rank, connection, asked, next: 0, open: HashMap::new() }
    }

    /// Asks a rank. There is an answer, or the reason why there is none, within `limit`.
    ///
    /// # Errors
    /// The rank is not there, leaves, or does not answer in time.
    pub async fn ask(&self, rank: Who, question: Question, limit: Duration) -> Result<Answer, NoAnswer> {
        self.ask_with(rank, question, None, limit).await
    }

    /// The same, with a descriptor.
    ///
    /// # Errors
    /// As for [`ask`](Self::ask).
    pub async fn ask_with(
        &self,
        rank: Who,
        question: Question,
        fd: Option<Arc<OwnedFd>>,
        limit: Duration,
    ) -> Result<Answer, NoAnswer> {
        let questions = self.lock().peers.get(&rank).map(|peer| peer.questions.clone()).ok_or(NoAnswer::Absent)?;
        let (reply, answer) = oneshot::channel();
        let asked = async {
            questions.send(Asked { question, fd, reply }).await.map_err(|_| NoAnswer::Left)?;
            answer.await.map_err(|_| NoAnswer::Left)
        };
        tokio::time::timeout(limit, asked).await.unwrap_or(Err(NoAnswer::Late))
    }

    /// Jobs that have ranks here, each with these.
    pub fn by_job(&self) -> BTreeMap<JobId, BTreeSet<u32>> {
        let mut jobs: BTreeMap<JobId, BTreeSet<u32>> = BTreeMap::new();
        for (job, rank) in self.lock().peers.keys() {
            jobs.entry(*job).or_default().insert(*rank);
        }
        jobs
    }

    /// The ranks of a job are about to have another revision of the plan: what they said is true no more.
    pub fn forget_revisions(&self, job: JobId) {
        for (_, peer) in self.lock().peers.range_mut((job, 0)..=(job, u32::MAX)) {
            peer.revision = None;
        }
    }

    /// A rank says which revision of the plan it has: the rank of its job that has another one, with that.
    pub fn has_revision(&self, rank: Who, revision: u64) -> Option<(u32, u64)> {
        let mut known = self.lock();
        known.peers.get_mut(&rank)?.revision = Some(revision);
        let of_job = known.peers.range((rank.0, 0)..=(rank.0, u32::MAX));
        of_job.into_iter().find_map(|((_, other), peer)| Some((*other, peer.revision.filter(|has| *has != revision)?)))
    }
}

/// The questions for one connection of a rank, and those that it has not answered.
pub struct Questions {
    ranks: Arc<Ranks>,
    rank: Who,
    connection: u64,
    asked: mpsc::Receiver<Asked>,
    next: u64,
    open: HashMap<u64, oneshot::Sender<Answer>>,
}

impl Questions {
    /// The next one to be sent, with its number. It waits while as many are open as may be.
    pub async fn next(&mut self) -> Sent {
        if self.open.len() >= MAX_QUESTIONS {
            return std::future::pending().await;
        }
        let Some(Asked { question, fd, reply }) = self.asked.recv().await else { return std::future::pending().await };
        let id = self.next;
        self.next += 1;
        self.open.insert(id, reply);
        (FromAgent::Ask { id, question }, fd)
    }

    /// The rank answers. What nobody asked, or nobody waits for any more, is dropped.
    pub fn answered(&mut self, id: u64, answer: Answer) {
        if let Some(reply) = self.open.remove(&id) {
            let _ = reply.send(answer);
        }
    }
}

impl Drop for Questions {
    fn drop(&mut self) {
        let mut known = self.ranks.lock();
        if known.peers.get(&self.rank).is_some_and(|peer| peer.connection == self.connection) {
            known.peers.remove(&self.rank);
        }
    }
}

#[cfg(test)]
mod tests {
    use wire::revision::Since;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn of(rank: u32) -> Who {
        (JobId::default(), rank)
    }

    fn plan(revision: u64) -> Answer {
        let (since, clauses) = (Since::default(), ["a".to_owned()].into_iter().collect());
        Answer::Plan { revision, since, heard: revision, open: None, clauses, ids: vec![1] }
    }

    fn number(ask: &Sent) -> u64 {
        let (FromAgent::Ask { id, question: Question::Plan }, None) = ask else { panic!("{ask:?}") };
        *id
    }

    #[tokio::test]
    async fn answers_come_to_who_asked_in_whatever_order() {
        let ranks = Arc::new(Ranks::default());
        let mut questions = ranks.join(of(3));
        let ask = || ranks.ask(of(3), Question::Plan, PATIENCE);
        let rank = async {
            let (first, second) = (questions.next().await, questions.next().await);
            questions.answered(number(&second), plan(2));
            questions.answered(77, plan(9));
            questions.answered(number(&first), plan(1));
            questions.answered(number(&first), plan(8));
        };
        let (first, second, ()) = tokio::join!(ask(), ask(), rank);
        let revision = |answer: Result<Answer, NoAnswer>| match answer.unwrap() {
            Answer::Plan { revision, .. } => revision,
            other => panic!("{other:?}"),
        };
        assert_eq!((revision(first), revision(second)), (1, 2));
    }

    #[tokio::test]
    async fn who_asks_learns_that_the_rank_is_absent_or_has_left_or_is_late() {
        let ranks = Arc::new(Ranks::default());
        let failed = |answer: Result<Answer, NoAnswer>| answer.unwrap_err();
        assert_eq!(failed(ranks.ask(of(3), Question::Plan, PATIENCE).await), NoAnswer::Absent);
        let mut questions = ranks.join(of(3));
        assert_eq!(failed(ranks.ask(of(3), Question::Plan, Duration::ZERO).await), NoAnswer::Late);
        let leaves = async {
            let _ = (questions.next().await, questions.next().await);
            drop(questions);
        };
        let (answer, ()) = tokio::join!(ranks.ask(of(3), Question::Plan, PATIENCE), leaves);
        assert_eq!(failed(answer), NoAnswer::Left);
        assert_eq!(failed(ranks.ask(of(3), Question::Plan, PATIENCE).await), NoAnswer::Absent);
    }

    #[tokio::test]
    async fn a_rank_that_answers_nothing_has_a_bounded_number_of_open_questions() {
        let ranks = Arc::new(Ranks::default());
        let mut questions = ranks.join(of(3));
        for _ in 0..MAX_QUESTIONS {
            assert_eq!(ranks.ask(of(3), Question::Plan, Duration::ZERO).await.unwrap_err(), NoAnswer::Late);
            questions.next().await;
        }
        assert_eq!(ranks.ask(of(3), Question::Plan, Duration::ZERO).await.unwrap_err(), NoAnswer::Late);
        let more = tokio::time::timeout(Duration::from_millis(1), questions.next());
        assert!(more.await.is_err());
        questions.answered(0, plan(0));
        assert_eq!(number(&questions.next().await), MAX_QUESTIONS as u64);
    }

    #[tokio::test]
    async fn the_end_of_an_old_connection_is_not_that_of_the_new_one() {
        let ranks = Arc::new(Ranks::default());
        let (old, mut new) = (ranks.join(of(3)), ranks.join(of(3)));
        drop(old);
        let answers = async {
            let id = number(&new.next().await);
            new.answered(id, plan(5));
        };
        let (answer, ()) = tokio::join!(ranks.ask(of(3), Question::Plan, PATIENCE), answers);
        assert!(answer.is_ok());
        assert_eq!(ranks.has_revision(of(3), 5), None);
        let _other = ranks.join(of(4));
        assert_eq!(ranks.has_revision(of(4), 6), Some((3, 5)));
        let another = (JobId { job: 1, attempt: 0 }, 4);
        let _another = ranks.join(another);
        assert_eq!(ranks.has_revision(another, 7), None, "of another job");
    }
}
