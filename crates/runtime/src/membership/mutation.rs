//! Rules that are known to be wrong, to show that the simulator and the model find them.

/// A defect that the core has on purpose; production has [`Mutation::None`], which nothing else can set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(not(test), expect(dead_code, reason = "only tests have defects on purpose"))]
pub(crate) enum Mutation {
    /// The protocol as it is.
    #[default]
    None,
    /// M1: each member settles the step in flight for itself, as torchft's replica groups do.
    UnilateralCommit,
    /// M2: the input of a step is the buffer that its result goes to, as in PCCL.
    InputInPlace,
    /// M3: data of all epochs have one namespace, as in torchrun's store.
    SharedNamespace,
    /// M4: a founder that has been restarted counts epochs from the beginning, as torchft's lighthouse does.
    EpochReset,
    /// M5: each member decides for itself whether it must catch up, as in Horovod.
    SkipSync,
    /// M6: a step is shown outside when it is applied here.
    ExternaliseApplied,
    /// M7: any half of the voters is a quorum.
    NoTieBreak,
    /// M8: a new ballot does not look at what was accepted before.
    IgnoreAccepted,
    /// M9: voters that are certified dead do not count in a quorum.
    CertifiedDeathShrinksQuorum,
    /// M10: the leader goes by its own workers' last step and not by the last of all.
    ProposersHistory,
    /// M11: a member that still fetches has a say in what is stable, as in a draft of this protocol.
    AnyReport,
    /// M12: what was removed comes back under its name. The driver's defect, since it draws.
    SameIncarnation,
}

#[cfg(test)]
impl Mutation {
    /// Those that the simulator finds in its seeds, M1 to M10. M11 it does not, and M12 is of the model's driver.
    pub(crate) const ALL: [Self; 10] = [
        Self::UnilateralCommit,
        Self::InputInPlace,
        Self::SharedNamespace,
        Self::EpochReset,
        Self::SkipSync,
        Self::ExternaliseApplied,
        Self::NoTieBreak,
        Self::IgnoreAccepted,
        Self::CertifiedDeathShrinksQuorum,
        Self::ProposersHistory,
    ];
}
