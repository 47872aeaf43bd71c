//! What can be measured: one line of a table each, and for each how it is called and what must come out.
//!
//! A new collective is a line in [`TABLE`], an arm in [`call`](Collective::call) and one in
//! [`expected`](Collective::expected).

use std::fmt;
use std::str::FromStr;

use paceline_runtime::collectives::{Communicator, Element, Error as CollectivesError, Kind, ReduceOp};
use serde::{Deserialize, Serialize};

/// A collective of [`Communicator`], or the ring of messages that nccl-tests call sendrecv.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Collective {
    /// Every rank gets the reduction of all inputs.
    AllReduce,
    /// Rank i gets chunk i of the reduction.
    ReduceScatter,
    /// Every rank gets all inputs.
    AllGather,
    /// Every rank gets the root's buffer.
    Broadcast,
    /// The root gets the reduction of all inputs.
    Reduce,
    /// The root gets all inputs.
    Gather,
    /// Rank i gets chunk i of the root's input.
    Scatter,
    /// Rank i gets chunk i of every input.
    AllToAll,
    /// Every rank sends to the next one and receives from the one before.
    SendRecv,
    /// Nobody leaves before everybody has entered.
    Barrier,
}

/// Where the result goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// Into a buffer of its own.
    OutOfPlace,
    /// Over the input, or at the rank's share of it.
    InPlace,
}

/// How the lengths of input and output follow from the count, which is a rank's share where there are shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// count in, count out.
    Whole,
    /// world size × count in, count out.
    Scattered,
    /// count in, world size × count out.
    Gathered,
    /// world size × count in and out.
    Exchanged,
    /// No elements.
    Empty,
}

/// What the tables need to know about a collective.
#[derive(Debug, Clone, Copy)]
pub struct Traits {
    collective: Collective,
    /// On the command line and in the tables.
    pub name: &'static str,
    /// The lengths of its buffers.
    pub shape: Shape,
    /// busbw / algbw for n ranks, from nccl-tests' doc/PERFORMANCE.md: what every link must carry at least, so that the
    /// number can be compared with the hardware whatever n is.
    pub bus_factor: fn(f64) -> f64,
    /// Which of the two places the communicator has, in the order of the tables.
    pub places: &'static [Place],
    /// Whether there is an operator.
    pub reduces: bool,
    /// Whether there is a root.
    pub has_root: bool,
    /// The fewest ranks it works with.
    pub least_ranks: u32,
}

const BOTH: &[Place] = &[Place::OutOfPlace, Place::InPlace];
const OUT_OF_PLACE: &[Place] = &[Place::OutOfPlace];
const IN_PLACE: &[Place] = &[Place::InPlace];

#[rustfmt::skip]
const TABLE: [Traits; 10] = {
    use Collective as C;
    let twice = |n: f64| 2.0 * (n - 1.0) / n;
    let once = |n: f64| (n - 1.0) / n;
    let whole = |_: f64| 1.0;
    [
        Traits { collective: C::AllReduce,     name: "all_reduce",     shape: Shape::Whole,     bus_factor: twice, places: BOTH,         reduces: true,  has_root: false, least_ranks: 1 },
        Traits { collective: C::ReduceScatter, name: "reduce_scatter", shape: Shape::Scattered, bus_factor: once,  places: BOTH,         reduces: true,  has_root: false, least_ranks: 1 },
        Traits { collective: C::AllGather,     name: "all_gather",     shape: Shape::Gathered,  bus_factor: once,  places: BOTH,         reduces: false, has_root: false, least_ranks: 1 },
        Traits { collective: C::Broadcast,     name: "broadcast",      shape: Shape::Whole,     bus_factor: whole, places: IN_PLACE,     reduces: false, has_root: true,  least_ranks: 1 },
        Traits { collective: C::Reduce,        name: "reduce",         shape: Shape::Whole,     bus_factor: whole, places: BOTH,         reduces: true,  has_root: true,  least_ranks: 1 },
        Traits { collective: C::Gather,        name: "gather",         shape: Shape::Gathered,  bus_factor: once,  places: OUT_OF_PLACE, reduces: false, has_root: true,  least_ranks: 1 },
        Traits { collective: C::Scatter,       name: "scatter",        shape: Shape::Scattered, bus_factor: once,  places: OUT_OF_PLACE, reduces: false, has_root: true,  least_ranks: 1 },
        Traits { collective: C::AllToAll,      name: "all_to_all",     shape: Shape::Exchanged, bus_factor: once,  places: OUT_OF_PLACE, reduces: false, has_root: false, least_ranks: 1 },
        Traits { collective: C::SendRecv,      name: "sendrecv",       shape: Shape::Whole,     bus_factor: whole, places: OUT_OF_PLACE, reduces: false, has_root: false, least_ranks: 2 },
        Traits { collective: C::Barrier,       name: "barrier",        shape: Shape::Empty,     bus_factor: whole, places: OUT_OF_PLACE, reduces: false, has_root: false, least_ranks: 1 },
    ]
};

/// What one element of a rank's output must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// The reduction of this element of all inputs.
    Reduced {
        /// Its index in the inputs.
        element: usize,
    },
    /// A copy.
    Copied {
        /// Whose input it comes from.
        rank: usize,
        /// Its index there.
        element: usize,
    },
}

/// A rank's place in its world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// The rank.
    pub rank: usize,
    /// The number of ranks.
    pub ranks: usize,
}

impl Member {
    /// The rank after it in the ring.
    pub fn next(self) -> usize {
        (self.rank + 1) % self.ranks
    }

    /// The rank before it in the ring.
    pub fn previous(self) -> usize {
        (self.rank + self.ranks - 1) % self.ranks
    }
}

impl Collective {
    /// All of them, in the table's order.
    pub fn all() -> impl Iterator<Item = Collective> {
        TABLE.iter().map(|traits| traits.collective)
    }

    /// Its line of the table.
    pub fn traits(self) -> &'static Traits {
        TABLE.iter().find(|traits| traits.collective == self).expect("every collective has its line")
    }

    /// What the communicator calls it, as rank 0 does.
    pub fn kind(self, op: ReduceOp, root: usize) -> Kind {
        match self {
            Collective::AllReduce => Kind::AllReduce(op),
            Collective::ReduceScatter => Kind::ReduceScatter(op),
            Collective::AllGather => Kind::AllGather,
            Collective::Broadcast => Kind::Broadcast { root },
            Collective::Reduce => Kind::Reduce { op, root },
            Collective::Gather => Kind::Gather { root },
            Collective::Scatter => Kind::Scatter { root },
            Collective::AllToAll => Kind::AllToAll,
            Collective::SendRecv => Kind::Message { from: 0, to: 1 },
            Collective::Barrier => Kind::Barrier,
        }
    }

    /// Whether the input of `member` matters: where the root has the elements, it is the only one.
    pub fn has_input(self, member: Member, root: usize) -> bool {
        match self {
            Collective::Broadcast | Collective::Scatter => member.rank == root,
            _ => true,
        }
    }

    /// Runs it once. In place, the elements are in `output`, which is as long as the longer of the two.
    ///
    /// # Errors
    /// The communicator's.
    pub fn call<T: Element>(
        self,
        communicator: &mut Communicator,
        place: Place,
        (op, root): (ReduceOp, usize),
        input: &[T],
        output: &mut [T],
    ) -> Result<(), CollectivesError> {
        match (self, place) {
            (Collective::AllReduce, Place::OutOfPlace) => communicator.all_reduce_into(input, output, op),
            (Collective::AllReduce, Place::InPlace) => communicator.all_reduce(output, op),
            (Collective::ReduceScatter, Place::OutOfPlace) => communicator.reduce_scatter(input, output, op),
            (Collective::ReduceScatter, Place::InPlace) => communicator.reduce_scatter_in_place(output, op),
            (Collective::AllGather, Place::OutOfPlace) => communicator.all_gather(input, output),
            (Collective::AllGather, Place::InPlace) => communicator.all_gather_in_place(output),
            (Collective::Reduce, Place::OutOfPlace) => communicator.reduce_into(input, output, op, root),
            (Collective::Reduce, Place::InPlace) => communicator.reduce(output, op, root),
            (Collective::Gather, _) => communicator.gather(input, output, root),
            (Collective::Scatter, _) => communicator.scatter(input, output, root),
            (Collective::AllToAll, _) => communicator.all_to_all(input, output),
            (Collective::Broadcast, _) => communicator.broadcast(output, root),
            (Collective::SendRecv, _) => pass_on(communicator, input, output),
            (Collective::Barrier, _) => communicator.barrier(),
        }
    }

    /// What element `index` of the output of `member` must be, for shares of `count` elements; `None` where it must
    /// be as it was before.
    pub fn expected(self, member: Member, count: usize, root: usize, index: usize) -> Option<Expected> {
        Some(match self {
            Collective::Reduce | Collective::Gather if member.rank != root => return None,
            Collective::AllReduce | Collective::Reduce => Expected::Reduced { element: index },
            Collective::ReduceScatter => Expected::Reduced { element: member.rank * count + index },
            Collective::AllGather | Collective::Gather => {
                Expected::Copied { rank: index / count, element: index % count }
            }
            Collective::Scatter => Expected::Copied { rank: root, element: member.rank * count + index },
            Collective::AllToAll => {
                Expected::Copied { rank: index / count, element: member.rank * count + index % count }
            }
            Collective::Broadcast => Expected::Copied { rank: root, element: index },
            Collective::SendRecv => Expected::Copied { rank: member.previous(), element: index },
            Collective::Barrier => unreachable!("a barrier has no elements"),
        })
    }
}

/// Sends to the next rank and receives from the one before. The even ranks send first: a ring in which all ranks send
/// first waits for ever once messages are longer than the links' windows.
fn pass_on<T: Element>(
    communicator: &mut Communicator,
    input: &[T],
    output: &mut [T],
) -> Result<(), CollectivesError> {
    let member = Member { rank: communicator.rank(), ranks: communicator.world_size() };
    if member.rank.is_multiple_of(2) {
        communicator.send(input, member.next())?;
        communicator.recv(output, member.previous())
    } else {
        communicator.recv(output, member.previous())?;
        communicator.send(input, member.next())
    }
}

impl Shape {
    /// The count for buffers of at most `elements` elements in all, but of one element where that is none.
    pub fn count(self, elements: usize, ranks: usize) -> usize {
        match self {
            Shape::Whole => elements.max(1),
            Shape::Scattered | Shape::Gathered | Shape::Exchanged => (elements / ranks).max(1),
            Shape::Empty => 0,
        }
    }

    /// Elements of the input and of the output.
    pub fn lens(self, count: usize, ranks: usize) -> (usize, usize) {
        match self {
            Shape::Whole => (count, count),
            Shape::Scattered => (count * ranks, count),
            Shape::Gathered => (count, count * ranks),
            Shape::Exchanged => (count * ranks, count * ranks),
            Shape::Empty => (0, 0),
        }
    }

    /// Where input and output begin in the buffer of a call in place.
    pub fn starts_in_place(self, count: usize, member: Member) -> (usize, usize) {
        match self {
            Shape::Scattered => (0, member.rank * count),
            Shape::Gathered => (member.rank * count, 0),
            Shape::Whole | Shape::Exchanged | Shape::Empty => (0, 0),
        }
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.traits().name)
    }
}

impl FromStr for Collective {
    type Err = String;

    /// Underscores may be left out: MPI and nccl-tests spell some of the names without.
    fn from_str(text: &str) -> Result<Self, String> {
        let bare = |name: &str| name.replace(['_', '-'], "");
        let names = || Collective::all().map(|collective| collective.traits().name).collect::<Vec<_>>();
        Collective::all()
            .find(|collective| bare(collective.traits().name) == bare(text))
            .ok_or_else(|| format!("choose one of {}", names().join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bus_factors_are_those_of_nccl_tests() {
        let factor = |collective: Collective, ranks| (collective.traits().bus_factor)(ranks);
        for (collective, of_4) in [
            (Collective::AllReduce, 1.5),
            (Collective::ReduceScatter, 0.75),
            (Collective::AllGather, 0.75),
            (Collective::Broadcast, 1.0),
            (Collective::Reduce, 1.0),
            (Collective::Gather, 0.75),
            (Collective::Scatter, 0.75),
            (Collective::AllToAll, 0.75),
            (Collective::SendRecv, 1.0),
        ] {
            assert_eq!(factor(collective, 4.0), of_4, "{collective}");
        }
        assert_eq!(factor(Collective::AllReduce, 1.0), 0.0, "one rank needs no bus");
    }

    #[test]
    fn names_are_found_with_and_without_underscores() {
        for collective in Collective::all() {
            assert_eq!(collective.to_string().parse(), Ok(collective));
        }
        assert_eq!("allreduce".parse(), Ok(Collective::AllReduce));
        assert_eq!("send_recv".parse(), Ok(Collective::SendRecv));
        assert_eq!("alltoall".parse(), Ok(Collective::AllToAll));
        assert_eq!("reduce".parse(), Ok(Collective::Reduce));
        let wrong = "scan".parse::<Collective>().expect_err("there is none");
        assert!(wrong.contains("all_reduce, reduce_scatter"), "{wrong}");
    }

    #[test]
    fn shares_are_cut_from_the_total_and_are_never_empty() {
        assert_eq!(Shape::Whole.count(7, 4), 7);
        assert_eq!(Shape::Gathered.count(7, 4), 1);
        assert_eq!(Shape::Scattered.count(3, 4), 1, "a table without numbers helps nobody");
        assert_eq!(Shape::Scattered.lens(5, 4), (20, 5));
        assert_eq!(Shape::Gathered.lens(5, 4), (5, 20));
        assert_eq!(Shape::Exchanged.lens(5, 4), (20, 20));
        assert_eq!(Shape::Empty.lens(Shape::Empty.count(9, 4), 4), (0, 0));
    }

    #[test]
    fn every_output_element_has_its_source() {
        let member = Member { rank: 1, ranks: 3 };
        let expected = |collective: Collective| collective.expected(member, 10, 2, 4).expect("it is written");
        assert_eq!(expected(Collective::AllReduce), Expected::Reduced { element: 4 });
        assert_eq!(expected(Collective::ReduceScatter), Expected::Reduced { element: 14 });
        assert_eq!(expected(Collective::Broadcast), Expected::Copied { rank: 2, element: 4 });
        assert_eq!(expected(Collective::SendRecv), Expected::Copied { rank: 0, element: 4 });
        assert_eq!(expected(Collective::Scatter), Expected::Copied { rank: 2, element: 14 });
        let of_24 = |collective: Collective, root| collective.expected(member, 10, root, 24);
        assert_eq!(of_24(Collective::AllGather, 0), Some(Expected::Copied { rank: 2, element: 4 }));
        assert_eq!(of_24(Collective::AllToAll, 0), Some(Expected::Copied { rank: 2, element: 14 }));
        assert_eq!(of_24(Collective::Gather, 1), Some(Expected::Copied { rank: 2, element: 4 }));
        assert_eq!(of_24(Collective::Reduce, 1), Some(Expected::Reduced { element: 24 }));
        for collective in [Collective::Gather, Collective::Reduce] {
            assert_eq!(of_24(collective, 0), None, "{collective}: rank 1 is not the root");
        }
    }
}
