//! The fastest algorithm by length. `cargo xtask tune` writes this file.
//!
//! Machine: AMD EPYC, 2 cores.

use super::Algorithm::*;
use super::choice::Row;
use crate::call::Operation::*;
use crate::transport::TransportKind::*;

const MAX: usize = usize::MAX;

#[rustfmt::skip]
pub(super) const MEASURED: &[Row] = &[
    Row { operation: AllReduce, transport: SharedMemory, ranks: 2, up_to: &[(16384, OneShot), (MAX, Ring)] },
    Row { operation: AllReduce, transport: SharedMemory, ranks: 4, up_to: &[(8192, OneShot), (65536, HalvingDoubling), (MAX, Ring)] },
    Row { operation: AllReduce, transport: Tcp, ranks: 2, up_to: &[(8192, OneShot), (MAX, Ring)] },
    Row { operation: AllReduce, transport: Tcp, ranks: 4, up_to: &[(4096, OneShot), (65536, HalvingDoubling), (MAX, Ring)] },
    Row { operation: AllReduce, transport: Tls, ranks: 2, up_to: &[(8192, OneShot), (MAX, Ring)] },
    Row { operation: AllReduce, transport: Tls, ranks: 4, up_to: &[(4096, OneShot), (65536, HalvingDoubling), (MAX, Ring)] },
    Row { operation: AllReduce, transport: Mixed, ranks: 4, up_to: &[(4096, OneShot), (MAX, Hierarchical)] },
    Row { operation: ReduceScatter, transport: SharedMemory, ranks: 2, up_to: &[(65536, OneShot), (MAX, Ring)] },
    Row { operation: ReduceScatter, transport: SharedMemory, ranks: 4, up_to: &[(32768, OneShot), (MAX, Ring)] },
    Row { operation: ReduceScatter, transport: Tcp, ranks: 2, up_to: &[(32768, OneShot), (MAX, Ring)] },
    Row { operation: ReduceScatter, transport: Tcp, ranks: 4, up_to: &[(16384, OneShot), (MAX, Ring)] },
    Row { operation: ReduceScatter, transport: Tls, ranks: 2, up_to: &[(32768, OneShot), (MAX, Ring)] },
    Row { operation: ReduceScatter, transport: Tls, ranks: 4, up_to: &[(16384, OneShot), (MAX, Ring)] },
    Row { operation: ReduceScatter, transport: Mixed, ranks: 4, up_to: &[(16384, OneShot), (MAX, Hierarchical)] },
    Row { operation: AllGather, transport: SharedMemory, ranks: 2, up_to: &[(65536, OneShot), (MAX, Ring)] },
    Row { operation: AllGather, transport: SharedMemory, ranks: 4, up_to: &[(32768, OneShot), (MAX, Ring)] },
    Row { operation: AllGather, transport: Tcp, ranks: 2, up_to: &[(32768, OneShot), (MAX, Ring)] },
    Row { operation: AllGather, transport: Tcp, ranks: 4, up_to: &[(16384, OneShot), (MAX, Ring)] },
    Row { operation: AllGather, transport: Tls, ranks: 2, up_to: &[(32768, OneShot), (MAX, Ring)] },
    Row { operation: AllGather, transport: Tls, ranks: 4, up_to: &[(16384, OneShot), (MAX, Ring)] },
    Row { operation: AllGather, transport: Mixed, ranks: 4, up_to: &[(16384, OneShot), (MAX, Hierarchical)] },
    Row { operation: Broadcast, transport: SharedMemory, ranks: 2, up_to: &[(MAX, Tree)] },
    Row { operation: Broadcast, transport: SharedMemory, ranks: 4, up_to: &[(262144, Tree), (MAX, Ring)] },
    Row { operation: Broadcast, transport: Tcp, ranks: 2, up_to: &[(MAX, Tree)] },
    Row { operation: Broadcast, transport: Tcp, ranks: 4, up_to: &[(262144, Tree), (MAX, Ring)] },
    Row { operation: Broadcast, transport: Tls, ranks: 2, up_to: &[(MAX, Tree)] },
    Row { operation: Broadcast, transport: Tls, ranks: 4, up_to: &[(262144, Tree), (MAX, Ring)] },
    Row { operation: Broadcast, transport: Mixed, ranks: 4, up_to: &[(262144, Tree), (MAX, Ring)] },
];
