//! The fastest algorithm by length. `cargo xtask tune` writes this file; the times behind it are in
//! `docs/collectives-choice.md`.
//!
//! Machine: AMD EPYC, 2 cores.

use super::Algorithm::*;
use super::choice::Row;
use crate::call::Operation::*;
use crate::transport::TransportKind::*;

const MAX: usize = usize::MAX;

#[rustfmt::skip]
pub(super) const MEASURED: &[Row] = &[
    Row { operation: AllReduce, transport: SharedMemory, ranks: 2, up_to: &[(8388608, OneShot), (MAX, Hierarchical)] },
    Row { operation: AllReduce, transport: SharedMemory, ranks: 4, up_to: &[(8192, OneShot), (2097152, HalvingDoubling), (MAX, Hierarchical)] },
    Row { operation: AllReduce, transport: Tcp, ranks: 2, up_to: &[(8388608, OneShot), (MAX, Ring)] },
    Row { operation: AllReduce, transport: Tcp, ranks: 4, up_to: &[(32768, OneShot), (131072, Tree), (524288, HalvingDoubling), (2097152, Hierarchical), (8388608, HalvingDoubling), (MAX, Direct)] },
    Row { operation: AllReduce, transport: Tls, ranks: 2, up_to: &[(8388608, OneShot), (MAX, Ring)] },
    Row { operation: AllReduce, transport: Tls, ranks: 4, up_to: &[(32768, OneShot), (8388608, HalvingDoubling), (MAX, Hierarchical)] },
    Row { operation: AllReduce, transport: Mixed, ranks: 4, up_to: &[(32768, OneShot), (MAX, Hierarchical)] },
    Row { operation: ReduceScatter, transport: SharedMemory, ranks: 2, up_to: &[(MAX, OneShot)] },
    Row { operation: ReduceScatter, transport: SharedMemory, ranks: 4, up_to: &[(2097152, Hierarchical), (8388608, Ring), (MAX, OneShot)] },
    Row { operation: ReduceScatter, transport: Tcp, ranks: 2, up_to: &[(8388608, OneShot), (MAX, Hierarchical)] },
    Row { operation: ReduceScatter, transport: Tcp, ranks: 4, up_to: &[(524288, Ring), (MAX, OneShot)] },
    Row { operation: ReduceScatter, transport: Tls, ranks: 2, up_to: &[(512, Ring), (8388608, OneShot), (MAX, Hierarchical)] },
    Row { operation: ReduceScatter, transport: Tls, ranks: 4, up_to: &[(524288, Ring), (MAX, OneShot)] },
    Row { operation: ReduceScatter, transport: Mixed, ranks: 4, up_to: &[(512, OneShot), (32768, Ring), (MAX, Hierarchical)] },
    Row { operation: AllGather, transport: SharedMemory, ranks: 2, up_to: &[(8388608, Ring), (MAX, OneShot)] },
    Row { operation: AllGather, transport: SharedMemory, ranks: 4, up_to: &[(8388608, Hierarchical), (MAX, OneShot)] },
    Row { operation: AllGather, transport: Tcp, ranks: 2, up_to: &[(MAX, OneShot)] },
    Row { operation: AllGather, transport: Tcp, ranks: 4, up_to: &[(8192, Ring), (MAX, OneShot)] },
    Row { operation: AllGather, transport: Tls, ranks: 2, up_to: &[(8192, Ring), (8388608, OneShot), (MAX, Hierarchical)] },
    Row { operation: AllGather, transport: Tls, ranks: 4, up_to: &[(512, OneShot), (524288, Ring), (2097152, Hierarchical), (8388608, OneShot), (MAX, Hierarchical)] },
    Row { operation: AllGather, transport: Mixed, ranks: 4, up_to: &[(512, OneShot), (2048, Hierarchical), (32768, Ring), (MAX, Hierarchical)] },
    Row { operation: Broadcast, transport: SharedMemory, ranks: 2, up_to: &[(8388608, Ring), (MAX, OneShot)] },
    Row { operation: Broadcast, transport: SharedMemory, ranks: 4, up_to: &[(512, Tree), (MAX, OneShot)] },
    Row { operation: Broadcast, transport: Tcp, ranks: 2, up_to: &[(8388608, OneShot), (MAX, Tree)] },
    Row { operation: Broadcast, transport: Tcp, ranks: 4, up_to: &[(131072, Ring), (MAX, Tree)] },
    Row { operation: Broadcast, transport: Tls, ranks: 2, up_to: &[(8388608, OneShot), (MAX, Tree)] },
    Row { operation: Broadcast, transport: Tls, ranks: 4, up_to: &[(32768, Ring), (524288, Tree), (MAX, OneShot)] },
    Row { operation: Broadcast, transport: Mixed, ranks: 4, up_to: &[(131072, Tree), (524288, OneShot), (MAX, Tree)] },
];
