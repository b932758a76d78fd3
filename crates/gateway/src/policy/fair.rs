//! The queue of requests that wait for a replica, shared fairly between keys (start-time fair queueing; Goyal, Vin and
//! Cheng 1996).
//!
//! Each request has a cost in tokens and its key a weight. A request's start is the later of the queue's virtual time
//! and its key's last finish, its finish is start + cost / weight, and the smallest start goes first. A key that sends
//! a thousand requests thus waits behind its own; one that sends a single request passes them. The queue is bounded,
//! and when it is full, the longest-waiting-behind-itself key loses its last request, not the newcomer: a flood can't
//! lock others out.

use std::collections::{BTreeMap, HashMap};

/// A request's place: its start (as ordered bits) and number.
type Place = (u64, u64);

/// Names a waiting request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Waiting(Place);

#[derive(Debug)]
struct Entry<T> {
    key: String,
    finish: f64,
    cost: u64,
    what: T,
}

#[derive(Debug, Default)]
struct Flow {
    finish: f64,
    waiting: usize,
}

/// What became of a request that came to a full queue.
#[derive(Debug, PartialEq)]
pub(crate) enum Full<T> {
    /// It is not taken: its own key has the most waiting.
    Refused,
    /// It is taken, in the place of this one.
    Instead(Waiting, T),
}

/// The queue.
#[derive(Debug)]
pub(crate) struct FairQueue<T> {
    virtual_time: f64,
    flows: HashMap<String, Flow>,
    entries: BTreeMap<Place, Entry<T>>,
    next: u64,
    tokens: u64,
}

impl<T> Default for FairQueue<T> {
    fn default() -> FairQueue<T> {
        FairQueue { virtual_time: 0.0, flows: HashMap::new(), entries: BTreeMap::new(), next: 0, tokens: 0 }
    }
}

impl<T> FairQueue<T> {
    /// Puts a request in; at most `bound` wait. `weight` is at least 1.
    pub(crate) fn push(
        &mut self,
        key: &str,
        weight: u32,
        cost: u64,
        what: T,
        bound: usize,
    ) -> (Option<Waiting>, Option<Full<T>>) {
        let mut full = None;
        if self.entries.len() >= bound.max(1) {
            let mine = self.flows.get(key).map_or(0, |flow| flow.waiting) + 1;
            let most = self.flows.iter().max_by_key(|(name, flow)| (flow.waiting, name.as_str()));
            let Some((name, _)) = most.filter(|(_, flow)| flow.waiting > mine) else {
                return (None, Some(Full::Refused));
            };
            let name = name.clone();
            let last =
                self.entries.iter().rev().find(|(_, entry)| entry.key == name).map(|(place, _)| *place);
            if let Some(place) = last {
                full = self.remove(Waiting(place)).map(|what| Full::Instead(Waiting(place), what));
            }
        }
        let flow = self.flows.entry(key.to_owned()).or_default();
        let start = flow.finish.max(self.virtual_time);
        flow.finish = start + cost.max(1) as f64 / f64::from(weight.max(1));
        flow.waiting += 1;
        // Starts are never negative, so their bits are in their order.
        let place = (start.to_bits(), self.next);
        self.next += 1;
        self.tokens += cost;
        self.entries.insert(place, Entry { key: key.to_owned(), finish: flow.finish, cost, what });
        (Some(Waiting(place)), full)
    }

    /// Who goes first.
    pub(crate) fn head(&self) -> Option<(Waiting, &T)> {
        self.entries.first_key_value().map(|(place, entry)| (Waiting(*place), &entry.what))
    }

    /// Takes a request out because it goes on.
    pub(crate) fn serve(&mut self, waiting: Waiting) -> Option<T> {
        self.virtual_time = self.virtual_time.max(f64::from_bits(waiting.0.0));
        self.take(waiting)
    }

    /// Takes a request out because nobody waits for it any more. Its key's later requests keep their places; new ones
    /// get its place.
    pub(crate) fn remove(&mut self, waiting: Waiting) -> Option<T> {
        let cost = self.entries.get(&waiting.0).map(|entry| entry.finish - f64::from_bits(waiting.0.0))?;
        let key = self.entries.get(&waiting.0).map(|entry| entry.key.clone())?;
        let what = self.take(waiting);
        if let Some(flow) = self.flows.get_mut(&key) {
            flow.finish = (flow.finish - cost).max(self.virtual_time);
        }
        what
    }

    fn take(&mut self, waiting: Waiting) -> Option<T> {
        let entry = self.entries.remove(&waiting.0)?;
        self.tokens -= entry.cost;
        if let Some(flow) = self.flows.get_mut(&entry.key) {
            flow.waiting -= 1;
        }
        if self.entries.is_empty() {
            // Nobody waits: nobody owes anybody anything.
            self.flows.clear();
            self.virtual_time = 0.0;
        } else if self.flows.len() > 2 * self.entries.len() + 64 {
            let now = self.virtual_time;
            self.flows.retain(|_, flow| flow.waiting > 0 || flow.finish > now);
        }
        Some(entry.what)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Tokens of all that wait.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    /// Two keys that always have something waiting get tokens in proportion to their weights, whatever sizes they send.
    #[test]
    fn tokens_follow_weights() {
        for seed in 0..10 {
            let mut rng = Philox::new(seed, 0);
            let mut queue = FairQueue::default();
            let mut got = [0u64; 2];
            let keys = [("light", 1u32, 50u64), ("heavy", 3, 400)];
            let mut push = |queue: &mut FairQueue<(usize, u64)>, key: usize| {
                let (name, weight, size) = keys[key];
                let cost = 1 + rng.next_u64() % size;
                queue.push(name, weight, cost, (key, cost), 1000);
            };
            for key in [0, 1].repeat(20) {
                push(&mut queue, key);
            }
            for _ in 0..20_000 {
                let (head, _) = queue.head().unwrap();
                let (key, cost) = queue.serve(head).unwrap();
                got[key] += cost;
                push(&mut queue, key);
            }
            let ratio = got[1] as f64 / got[0] as f64;
            assert!((2.7..3.3).contains(&ratio), "seed {seed}: {ratio}");
        }
    }

    #[test]
    fn one_request_passes_a_flood() {
        let mut queue = FairQueue::default();
        for i in 0..1000 {
            queue.push("flood", 1, 100, i, 2000);
        }
        let (head, _) = queue.head().unwrap();
        queue.serve(head);
        queue.push("quiet", 1, 100, 5000, 2000);
        let order: Vec<i32> = (0..3)
            .map(|_| {
                let (head, _) = queue.head().unwrap();
                queue.serve(head).unwrap()
            })
            .collect();
        assert!(order.contains(&5000), "{order:?}");
    }

    #[test]
    fn a_full_queue_makes_room_at_the_cost_of_who_fills_it() {
        let mut queue = FairQueue::default();
        for i in 0..10 {
            assert!(queue.push("flood", 1, 1, i, 10).1.is_none());
        }
        assert_eq!(queue.push("flood", 1, 1, 10, 10), (None, Some(Full::Refused)));
        let (taken, full) = queue.push("quiet", 1, 1, 11, 10);
        assert!(taken.is_some());
        assert!(matches!(full, Some(Full::Instead(_, 9))), "its last one goes: {full:?}");
        assert_eq!((queue.len(), queue.tokens()), (10, 10));
    }

    #[test]
    fn who_leaves_costs_nobody() {
        let mut queue = FairQueue::default();
        let gone = queue.push("a", 1, 1000, 1, 10).0.unwrap();
        queue.push("b", 1, 1, 2, 10);
        queue.remove(gone);
        queue.push("a", 1, 1, 3, 10);
        let mut order = Vec::new();
        while let Some((head, _)) = queue.head() {
            order.extend(queue.serve(head));
        }
        assert_eq!(order, [2, 3]);
        assert!(queue.flows.is_empty());
    }
}
