//! The engine: runs a schedule on a transport until it is done, or a deadline has passed, or a peer is lost.
//!
//! One loop over lanes (one to each peer, one from each, and those of what is shared). Each visit moves one segment at
//! most, so that sending, receiving and adding take turns and a segment is still in the cache when it is added. When a
//! whole round moves nothing, the thread waits, and only then looks at the clock and at who is alive: a call that flows
//! pays nothing for them.

use std::time::{Duration, Instant};

use crate::call::{Call, Header, Operation};
use crate::control::Control;
use crate::element::Reducer;
use crate::error::{Error, Fault, Where};
use crate::schedule::{Action, Plan, Region, Route, Span};
use crate::transport::{Line, Transport};

/// A wait longer than this is told to the peers, with what was called.
const STALL: Duration = Duration::from_millis(20);
/// The longest single sleep: a bound on a lost wake.
const NAP: Duration = Duration::from_millis(100);
/// How long bytes of a peer that left properly, or words of one that broke a data connection, may still be under way.
const GRACE: Duration = Duration::from_millis(100);

/// The buffers of a call.
pub(crate) struct Buffers<'a> {
    pub(crate) main: &'a mut [u8],
    pub(crate) source: &'a [u8],
    pub(crate) scratch: &'a mut [u8],
    /// Bytes of an element.
    pub(crate) width: usize,
    pub(crate) reduce: Reducer,
}

impl Buffers<'_> {
    fn read(&self, span: Span) -> &[u8] {
        let range = span.start..span.start + span.len;
        match span.region {
            Region::Main => &self.main[range],
            Region::Source => &self.source[range],
            Region::Scratch => &self.scratch[range],
        }
    }

    fn write(&mut self, span: Span) -> &mut [u8] {
        let range = span.start..span.start + span.len;
        match span.region {
            Region::Scratch => &mut self.scratch[range],
            Region::Main | Region::Source => &mut self.main[range],
        }
    }

    /// The span that is written and the one that is read; they are in different regions.
    fn both(&mut self, to: Span, from: Span) -> (&mut [u8], &[u8]) {
        let (write, read) = (to.start..to.start + to.len, from.start..from.start + from.len);
        match (to.region, from.region) {
            (Region::Scratch, Region::Source) => (&mut self.scratch[write], &self.source[read]),
            (Region::Scratch, _) => (&mut self.scratch[write], &self.main[read]),
            (_, Region::Source) => (&mut self.main[write], &self.source[read]),
            _ => (&mut self.main[write], &self.scratch[read]),
        }
    }
}

/// One call under way.
pub(crate) struct Flow<'a> {
    pub(crate) transport: &'a mut dyn Transport,
    pub(crate) control: &'a Control,
    /// Rank of the epoch for each rank of the group.
    pub(crate) members: &'a [usize],
    pub(crate) epoch: u64,
    /// This rank, of the group.
    pub(crate) rank: usize,
    pub(crate) call: Call,
    /// Calls before this one, of any group of the epoch.
    pub(crate) earlier: &'a [Call],
    pub(crate) limit: Duration,
}

/// What waiting has found so far.
#[derive(Default)]
struct Patience {
    /// When the call first had to wait; its deadline counts from here.
    began: Option<Instant>,
    /// Since when nothing has moved.
    since: Option<Instant>,
    announced: bool,
    changes: u64,
    /// When a fault that bytes under way could still undo was first seen.
    doubt: Option<Instant>,
    sends: Vec<Line>,
    recvs: Vec<Line>,
    /// Whom those wait for.
    peers: Vec<usize>,
    /// Where a header lies that this call doesn't read.
    stray: Option<Line>,
}

impl Flow<'_> {
    /// Runs `plan` over the buffers.
    pub(crate) fn run(&mut self, plan: &mut Plan, buffers: &mut Buffers<'_>) -> Result<(), Error> {
        let mut patience = Patience::default();
        self.transport.begin(buffers.main.len());
        let result = self.turn(plan, buffers, &mut patience);
        if patience.announced {
            self.control.announce(None);
        }
        result
    }

    fn turn(
        &mut self,
        plan: &mut Plan,
        buffers: &mut Buffers<'_>,
        patience: &mut Patience,
    ) -> Result<(), Error> {
        loop {
            let mut moved = false;
            let mut unfinished = false;
            let mut broken = None;
            for lane in 0..plan.lanes.len() {
                match self.visit(plan, lane, buffers) {
                    Ok((progress, finished)) => {
                        moved |= progress;
                        unfinished |= !finished;
                    }
                    Err(Stop::Fault(fault)) => {
                        // Other lanes may still move: the peer may have told somebody why.
                        unfinished = true;
                        broken = broken.or(Some(fault));
                    }
                    Err(Stop::Mismatch { peer, header, expected }) => {
                        return Err(self.mismatch(plan, peer, &header, expected));
                    }
                }
            }
            if !unfinished {
                return Ok(());
            }
            if moved {
                patience.since = None;
                patience.doubt = None;
                patience.stray = None;
            } else {
                self.wait(plan, patience, broken)?;
            }
        }
    }

    /// One segment of one lane: whether anything moved, and whether the lane is done.
    fn visit(
        &mut self,
        plan: &mut Plan,
        lane: usize,
        buffers: &mut Buffers<'_>,
    ) -> Result<(bool, bool), Stop> {
        let Some(index) = plan.front(lane) else {
            return match self.line(plan.lanes[lane].route) {
                Some((to, true)) => Ok((false, self.transport.flush(to)?)),
                _ => Ok((false, true)),
            };
        };
        let mut moved = false;
        if !plan.lanes[lane].open {
            if !self.open(plan, lane)? {
                return Ok((false, false));
            }
            moved = true;
        }
        let (action, span) = plan.ready(index);
        let bytes = if span.len == 0 {
            0
        } else {
            match action {
                Action::Send(to) => self.transport.send(self.pair(to), buffers.read(span))?,
                Action::Share => self.transport.send(self.shared(self.rank), buffers.read(span))?,
                Action::Recv(from) => self.transport.recv(self.pair(from), buffers.write(span))?,
                Action::Take(from) => self.transport.recv(self.shared(from), buffers.write(span))?,
                Action::RecvReduce(from) => {
                    let (width, reduce) = (buffers.width, buffers.reduce);
                    // Only whole elements may be ready, or the transport would cut one.
                    let span = Span { len: span.len / width * width, ..span };
                    self.transport.recv_reduce(self.pair(from), buffers.write(span), width, reduce)?
                }
                Action::Copy(from) => {
                    let (into, from) = buffers.both(span, from);
                    into.copy_from_slice(from);
                    span.len
                }
                Action::Reduce(from) => {
                    let reduce = buffers.reduce;
                    let len = span.len / buffers.width * buffers.width;
                    let (into, from) = buffers.both(span, from);
                    reduce(&mut into[..len], &from[..len]);
                    len
                }
            }
        };
        let finished = plan.advance(lane, bytes);
        moved |= bytes > 0 || finished;
        let done = finished
            && plan.front(lane).is_none()
            && match self.line(plan.lanes[lane].route) {
                Some((to, true)) => self.transport.flush(to)?,
                _ => true,
            };
        Ok((moved, done))
    }

    fn pair(&self, peer: usize) -> Line {
        Line::Pair(self.members[peer])
    }

    fn shared(&self, from: usize) -> Line {
        Line::Shared(self.members[from])
    }

    /// What a lane's bytes go over, and whether they go out.
    fn line(&self, route: Route) -> Option<(Line, bool)> {
        match route {
            Route::Within => None,
            Route::To(to) => Some((self.pair(to), true)),
            Route::From(from) => Some((self.pair(from), false)),
            Route::ToAll => Some((self.shared(self.rank), true)),
            Route::Shared(from) => Some((self.shared(from), false)),
        }
    }

    /// Sends or awaits the header before a lane's bytes.
    fn open(&mut self, plan: &mut Plan, lane: usize) -> Result<bool, Stop> {
        let expected = plan.lanes[lane].bytes as u64;
        let open = match self.line(plan.lanes[lane].route) {
            None => true,
            Some((to, true)) => self.transport.open_send(to, &self.call.encode(expected))?,
            Some((from, false)) => match self.transport.open_recv(from)? {
                None => false,
                Some(header) => {
                    if Call::decode(&header) != Some((self.call, expected)) {
                        return Err(Stop::Mismatch { peer: from.rank(), header: Box::new(header), expected });
                    }
                    true
                }
            },
        };
        plan.lanes[lane].open = open;
        Ok(open)
    }

    fn at(&self, plan: &Plan) -> Where {
        Where {
            rank: self.members[self.rank],
            epoch: self.epoch,
            call: Some(self.call),
            bytes_done: plan.bytes_done(),
        }
    }

    fn mismatch(&mut self, plan: &Plan, peer: usize, header: &Header, expected: u64) -> Error {
        let at = self.at(plan);
        // A call that only shares is over before anyone takes it; what its rank sends next must not hide it.
        let first = self.transport.peek(Line::Shared(peer)).filter(|shared| {
            let call = Call::decode(shared).map(|(call, _)| call);
            call.is_some_and(|call| self.same_place(&call) && call != self.call)
        });
        let header = first.as_ref().unwrap_or(header);
        match Call::decode(header) {
            None => Error::Corrupt { peer, what: format!("a call that begins {:02x?}", &header[..16]), at },
            Some((theirs, bytes)) if theirs == self.call => Error::Mismatch {
                peer,
                mine: format!("{}, expecting {expected} bytes from it", self.call),
                theirs: format!("{theirs}, sending {bytes} bytes"),
                at,
            },
            Some((theirs, _)) => {
                // The peer may still be where this rank was before: a call that only sends ends before anyone objects.
                let same_place =
                    |c: &&Call| c.group == theirs.group && c.sequence == theirs.sequence && **c != theirs;
                let before = self.earlier.iter().find(same_place);
                let before = before.map_or(String::new(), |c| format!(" (and {c} before)"));
                let mine = format!("{}{before}", self.describe(&self.call));
                Error::Mismatch { peer, mine, theirs: self.describe(&theirs), at }
            }
        }
    }

    /// Whether a call is, for its rank, what this one is for this rank.
    fn same_place(&self, call: &Call) -> bool {
        (call.group, call.sequence) == (self.call.group, self.call.sequence)
    }

    /// The header of another call on a line that this one doesn't read, from a rank that it waits for. Twice in a row
    /// with nothing moved between: a rank may be done with this call and in the next, but then what it sent before is here.
    fn stray(&mut self, plan: &Plan, patience: &mut Patience) -> Option<(usize, Header)> {
        let found = patience.recvs.iter().find_map(|line| {
            let other = match *line {
                Line::Pair(peer) => Line::Shared(peer),
                Line::Shared(peer) => Line::Pair(peer),
            };
            let read = plan.lanes.iter().any(|lane| self.line(lane.route) == Some((other, false)));
            let header = if read { None } else { self.transport.peek(other) };
            header.map(|header| (other, header))
        });
        let before = std::mem::replace(&mut patience.stray, found.map(|(line, _)| line));
        found.filter(|(line, _)| before == Some(*line)).map(|(line, header)| (line.rank(), header))
    }

    fn describe(&self, call: &Call) -> String {
        let pairs = [call, &self.call].iter().any(|c| c.operation == Operation::SendRecv);
        let foreign = if call.group == self.call.group || pairs { "" } else { " of another group" };
        format!("{call}{foreign}")
    }

    /// Nothing moved: sleeps until something may, or says why nothing will.
    fn wait(&mut self, plan: &Plan, patience: &mut Patience, broken: Option<Fault>) -> Result<(), Error> {
        patience.sends.clear();
        patience.recvs.clear();
        for (index, lane) in plan.lanes.iter().enumerate() {
            // A lane that waits for another of ours waits for that one's peer.
            let blocked = plan.front(index).is_some_and(|step| lane.open && plan.ready(step).1.len == 0);
            match self.line(lane.route) {
                // A lane that is done and on its way has nothing to wait for.
                Some((to, true))
                    if !blocked
                        && (plan.front(index).is_some() || !self.transport.flush(to).unwrap_or(false)) =>
                {
                    patience.sends.push(to);
                }
                Some((from, false)) if !blocked && plan.front(index).is_some() => {
                    patience.recvs.push(from);
                }
                _ => {}
            }
        }
        let Some(since) = patience.since else {
            // The first time: a short wait that mostly spins, and no questions asked.
            let now = Instant::now();
            patience.since = Some(now);
            let began = *patience.began.get_or_insert(now);
            let late = now.duration_since(began) >= self.limit;
            if broken.is_none() && !late && self.control.changes() == patience.changes {
                self.transport.wait(&patience.sends, &patience.recvs, STALL.min(self.limit));
            }
            return Ok(());
        };
        let now = Instant::now();
        let began = patience.began.unwrap_or(since);
        patience.peers.clear();
        patience.peers.extend(patience.sends.iter().flat_map(|line| self.transport.behind(*line)));
        patience.peers.extend(patience.recvs.iter().map(|line| line.rank()));
        patience.peers.sort_unstable();
        patience.peers.dedup();
        let changes = self.control.changes();
        self.judge(plan, patience, broken, now)?;
        if patience.announced
            && let Some((peer, header)) = self.stray(plan, patience)
        {
            return Err(self.mismatch(plan, peer, &header, 0));
        }
        if now.duration_since(since) >= STALL && !patience.announced {
            patience.announced = true;
            self.control.announce(Some(self.call));
        }
        if now.duration_since(began) >= self.limit {
            return Err(self.late(plan, patience));
        }
        let left = self.limit.saturating_sub(now.duration_since(began));
        if self.control.changes() == changes {
            let nap = if patience.announced { NAP } else { STALL };
            let nap = if patience.doubt.is_some() { nap.min(Duration::from_millis(2)) } else { nap };
            self.transport.wait(&patience.sends, &patience.recvs, left.min(nap));
        }
        patience.changes = changes;
        Ok(())
    }

    /// Whether what is known of the peers ends this call.
    fn judge(
        &self,
        plan: &Plan,
        patience: &mut Patience,
        broken: Option<Fault>,
        now: Instant,
    ) -> Result<(), Error> {
        if let Some(fault) = self.control.fault() {
            return Err(fault_error(fault, self.at(plan)));
        }
        if patience.announced {
            for (peer, theirs) in self.control.calls().into_iter().enumerate() {
                let Some(theirs) = theirs else { continue };
                if self.same_place(&theirs) && theirs != self.call {
                    let (mine, theirs) = (self.call.to_string(), theirs.to_string());
                    return Err(Error::Mismatch { peer, mine, theirs, at: self.at(plan) });
                }
            }
        }
        let mut waiting = patience.peers.iter().copied();
        let left = waiting.find(|peer| self.control.has_left(*peer)).map(|peer| Fault::Left { peer });
        let Some(fault) = broken.or(left) else { return Ok(()) };
        let doubt = *patience.doubt.get_or_insert(now);
        if matches!(fault, Fault::Lost { .. } | Fault::Left { .. }) && now.duration_since(doubt) < GRACE {
            return Ok(());
        }
        Err(fault_error(fault, self.at(plan)))
    }

    fn late(&self, plan: &Plan, patience: &Patience) -> Error {
        let calls = self.control.calls();
        let doing = |peer: &usize| match &calls[*peer] {
            Some(call) => format!("rank {peer} (which waits in {})", self.describe(call)),
            None => format!("rank {peer} (alive, not waiting in a call)"),
        };
        Error::Deadline {
            limit_ms: self.limit.as_millis() as u64,
            waiting_for: patience.peers.iter().map(doing).collect::<Vec<_>>().join(", "),
            at: self.at(plan),
        }
    }
}

/// Why a visit ended early.
enum Stop {
    Fault(Fault),
    Mismatch { peer: usize, header: Box<Header>, expected: u64 },
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// A fault as the error of a call.
pub(crate) fn fault_error(fault: Fault, at: Where) -> Error {
    match fault {
        Fault::Lost { peer, how } => Error::PeerLost { peer, how, at },
        Fault::Left { peer } => Error::PeerLost { peer, how: "it left the group".into(), at },
        Fault::Silent { peer, silent } => {
            Error::PeerSilent { peer, silent_ms: silent.as_millis() as u64, at }
        }
        Fault::Corrupt { peer, what } => Error::Corrupt { peer, what, at },
        Fault::Aborted { by, reason, lost: Some(peer) } if peer != at.rank => {
            Error::PeerLost { peer, how: format!("rank {by}: {reason}"), at }
        }
        Fault::Aborted { by, reason, .. } => Error::Aborted { by, reason, at },
    }
}
