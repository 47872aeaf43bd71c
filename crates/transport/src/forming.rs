//! Links that are being made.

use tokio::sync::oneshot;

use crate::{Error, Transport};

/// The links of a new group, as soon as they are there. Dropping it gives the group up.
#[derive(Debug)]
pub struct Forming {
    result: oneshot::Receiver<Result<Box<dyn Transport>, Error>>,
}

/// Where whoever forms the links leaves them.
#[derive(Debug)]
pub struct Former {
    result: oneshot::Sender<Result<Box<dyn Transport>, Error>>,
}

impl Forming {
    /// Links that are not there yet, and the other end.
    pub fn new() -> (Former, Self) {
        let (sender, receiver) = oneshot::channel();
        (Former { result: sender }, Self { result: receiver })
    }

    /// Takes the links, or why there are none; `None` while that is open. Does not block.
    pub fn take(&mut self) -> Option<Result<Box<dyn Transport>, Error>> {
        match self.result.try_recv() {
            Ok(result) => Some(result),
            Err(oneshot::error::TryRecvError::Empty) => None,
            Err(oneshot::error::TryRecvError::Closed) => {
                Some(Err(Error::Usage { reason: "nobody forms these links any more".to_owned() }))
            }
        }
    }
}

impl Former {
    /// Leaves the result. It is dropped when nobody waits for it any more.
    pub fn finish(self, result: Result<Box<dyn Transport>, Error>) {
        drop(self.result.send(result));
    }

    /// Completes when nobody waits for the result any more.
    pub async fn given_up(&mut self) {
        self.result.closed().await;
    }
}

/// Checks the members of a new group and returns the place of `rank` among them.
pub(crate) fn place(members: &[usize], rank: usize, world_size: usize) -> Result<usize, Error> {
    let usage = |reason| Err(Error::Usage { reason });
    if let Some(stranger) = members.iter().find(|&&member| member >= world_size) {
        return usage(format!("rank {stranger} does not exist; the ranks are 0 to {}", world_size - 1));
    }
    let twice = |at: usize| members[..at].contains(&members[at]);
    if let Some(at) = (0..members.len()).find(|&at| twice(at)) {
        return usage(format!("rank {} is twice in the new group", members[at]));
    }
    match members.iter().position(|&member| member == rank) {
        Some(place) => Ok(place),
        None => usage(format!("rank {rank} is not a member of the group that it forms")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_has_one_place_among_members_that_exist() {
        assert_eq!(place(&[2, 0], 0, 3), Ok(1));
        for (members, reason) in
            [(&[2, 1][..], "not a member"), (&[0, 3], "does not exist"), (&[0, 0], "twice")]
        {
            let error = place(members, 0, 3).expect_err("they do not fit").to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_former_that_is_dropped_ends_the_wait() {
        let (former, mut forming) = Forming::new();
        assert!(forming.take().is_none());
        drop(former);
        assert!(matches!(forming.take(), Some(Err(Error::Usage { .. }))));
    }
}
