//! The merge loop that byte-pair encoding and SentencePiece share.
//!
//! Start from single symbols; again and again replace the best pair of neighbours by the token that spells both,
//! until no pair is a token. Best is the lowest key; among equals the leftmost. A heap over a linked list of
//! symbols makes it O(n log n): a 100,000-letter word takes milliseconds, where rescanning would take minutes.
//!
//! Sources: Sennrich et al. 2016 for pairs ranked by order of merging; Kudo 2018 (SentencePiece) for pairs ranked by
//! the score of what they make.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A piece of the text under way: bytes `start..end` of it, and the token that spells them, if one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Symbol {
    pub(crate) token: Option<u32>,
    pub(crate) start: u32,
    pub(crate) end: u32,
}

/// Which neighbours merge, and how eagerly.
pub(crate) trait Pairs {
    /// The key (lower merges first) and the token that `left` and `right` make.
    fn pair(&self, left: Symbol, right: Symbol) -> Option<(u32, u32)>;
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Node {
    symbol: Symbol,
    previous: u32,
    next: u32,
}

/// Merges `symbols` (in order, contiguous) as far as `pairs` allows; `emit` gets what is left, in order.
pub(crate) fn merge(symbols: &[Symbol], pairs: &impl Pairs, mut emit: impl FnMut(Symbol)) {
    let count = symbols.len() as u32;
    let mut nodes: Vec<Node> = (0..count)
        .zip(symbols)
        .map(|(i, &symbol)| Node {
            symbol,
            previous: if i == 0 { NONE } else { i - 1 },
            next: if i + 1 == count { NONE } else { i + 1 },
        })
        .collect();

    // (key, left node, end of the pair in the text, token). The end tells a stale entry: nodes only ever grow.
    let mut heap: BinaryHeap<Reverse<(u32, u32, u32, u32)>> = BinaryHeap::new();
    let push = |heap: &mut BinaryHeap<_>, nodes: &[Node], left: u32, right: u32| {
        let (l, r) = (nodes[left as usize].symbol, nodes[right as usize].symbol);
        if let Some((key, token)) = pairs.pair(l, r) {
            heap.push(Reverse((key, left, r.end, token)));
        }
    };
    for right in 1..count {
        push(&mut heap, &nodes, right - 1, right);
    }

    while let Some(Reverse((key, left, end, token))) = heap.pop() {
        let node = nodes[left as usize];
        let right = node.next;
        // Stale: the left symbol is gone (empty), or it or its neighbour has grown since.
        if right == NONE || node.symbol.start == node.symbol.end {
            continue;
        }
        let neighbour = nodes[right as usize];
        if neighbour.symbol.end != end || pairs.pair(node.symbol, neighbour.symbol) != Some((key, token)) {
            continue;
        }
        nodes[left as usize].symbol.end = end;
        nodes[left as usize].symbol.token = Some(token);
        nodes[left as usize].next = neighbour.next;
        nodes[right as usize].symbol.end = neighbour.symbol.start;
        if neighbour.next != NONE {
            nodes[neighbour.next as usize].previous = left;
            push(&mut heap, &nodes, left, neighbour.next);
        }
        if node.previous != NONE {
            push(&mut heap, &nodes, node.previous, left);
        }
    }

    let mut at = if count == 0 { NONE } else { 0 };
    while at != NONE {
        emit(nodes[at as usize].symbol);
        at = nodes[at as usize].next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    struct Table(HashMap<(u32, u32), (u32, u32)>);

    impl Pairs for Table {
        fn pair(&self, left: Symbol, right: Symbol) -> Option<(u32, u32)> {
            self.0.get(&(left.token?, right.token?)).copied()
        }
    }

    fn run(tokens: &[u32], table: &Table) -> Vec<u32> {
        let symbols: Vec<Symbol> =
            (0..).zip(tokens).map(|(i, &t)| Symbol { token: Some(t), start: i, end: i + 1 }).collect();
        let mut out = Vec::new();
        merge(&symbols, table, |s| out.extend(s.token));
        out
    }

    /// The definition: scan for the best pair, merge it, start over.
    fn plainly(tokens: &[u32], table: &Table) -> Vec<u32> {
        let mut tokens = tokens.to_vec();
        loop {
            let best = (1..tokens.len())
                .filter_map(|i| table.0.get(&(tokens[i - 1], tokens[i])).map(|&(key, t)| (key, i, t)))
                .min();
            let Some((_, i, token)) = best else { return tokens };
            tokens[i - 1] = token;
            tokens.remove(i);
        }
    }

    #[test]
    fn equals_the_definition() {
        // Over four letters and their pairs, with keys that collide.
        let mut state = 1u32;
        let mut random = move |n: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % n
        };
        for _ in 0..300 {
            let mut table = HashMap::new();
            for made in 4..24 {
                table.insert((random(made), random(made)), (random(8), made));
            }
            let table = Table(table);
            let text: Vec<u32> = (0..random(60)).map(|_| random(4)).collect();
            assert_eq!(run(&text, &table), plainly(&text, &table), "{text:?} with {:?}", table.0);
        }
    }
}
