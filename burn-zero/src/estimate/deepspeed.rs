//! DeepSpeed's estimates of what model states need, as its code computes them (`runtime/zero/stage_1_and_2.py` and
//! `stage3.py`; the numbers in its documentation are of an older formula).

/// The machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nodes {
    /// The number of machines.
    pub nodes: u64,
    /// The number of devices of each.
    pub devices: u64,
}

/// What is kept in the host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// Nothing.
    None,
    /// Optimizer states.
    Optimizer,
    /// Optimizer states and parameters.
    All,
}

/// Bytes for parameters, gradients and optimizer states; no activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// On each device.
    pub device: u64,
    /// On each host, its share of buffers (half as much again) included.
    pub host: u64,
}

/// Half as much again: DeepSpeed's default `additional_buffer_factor` of 1.5.
fn buffered(bytes: u64) -> u64 {
    bytes * 3 / 2
}

/// DeepSpeed's `estimate_zero2_model_states_mem_needs` for `parameters` weights; `offload` moves optimizer states to the host.
///
/// # Panics
/// If there is no node or no device.
pub fn zero2(parameters: u64, nodes: Nodes, offload: bool) -> Estimate {
    let world = nodes.nodes * nodes.devices;
    if offload {
        // Two bytes for the weights here; there, a gradient of four bytes for each rank or weight and two moments.
        Estimate { device: 2 * parameters, host: buffered(parameters * (4 * world).max(16)) }
    } else {
        Estimate { device: 2 * parameters + 18 * parameters / world, host: buffered(parameters * 4 * nodes.devices) }
    }
}

/// DeepSpeed's `estimate_zero3_model_states_mem_needs` for `parameters` weights, of which the largest layer has
/// `largest_layer`. With `init` the model is made in pieces (`zero.Init`), else every process of a host first holds all of it.
///
/// # Panics
/// If there is no node or no device.
pub fn zero3(parameters: u64, largest_layer: u64, nodes: Nodes, offload: Offload, init: bool) -> Estimate {
    let world = nodes.nodes * nodes.devices;
    let (sharded, per_weight) = match offload {
        Offload::All => (0, 18),
        Offload::Optimizer => (2 * parameters / world, 16),
        Offload::None => (18 * parameters / world, 0),
    };
    let copies = 4 * nodes.devices;
    let host = match (offload, init) {
        (Offload::None, true) => largest_layer * copies,
        (_, true) => parameters * per_weight / nodes.nodes,
        (_, false) => (parameters * per_weight / nodes.nodes).max(parameters * copies),
    };
    Estimate { device: 4 * largest_layer + sharded, host: buffered(host) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Nodes = Nodes { nodes: 1, devices: 8 };
    /// T5-3B, DeepSpeed's example.
    const PARAMETERS: u64 = 2_851_000_000;
    const LARGEST: u64 = 32_000_000;

    fn gib(bytes: u64) -> f64 {
        (bytes as f64 / (1u64 << 30) as f64 * 100.0).round() / 100.0
    }

    #[test]
    fn every_golden_number_holds() {
        // (estimate, host GiB, device GiB)
        let three = |offload, init| zero3(PARAMETERS, LARGEST, NODE, offload, init);
        let table = [
            (zero2(PARAMETERS, NODE, true), 127.45, 5.31),
            (zero2(PARAMETERS, NODE, false), 127.45, 11.28),
            (three(Offload::All, true), 71.69, 0.12),
            (three(Offload::All, false), 127.45, 0.12),
            (three(Offload::Optimizer, true), 63.72, 0.78),
            (three(Offload::Optimizer, false), 127.45, 0.78),
            (three(Offload::None, true), 1.43, 6.09),
            (three(Offload::None, false), 127.45, 6.09),
        ];
        for (estimate, host, device) in table {
            assert_eq!((gib(estimate.host), gib(estimate.device)), (host, device));
        }
    }

    #[test]
    fn the_documentation_of_deepspeed_is_stale() {
        let documented = 4 * PARAMETERS + 16 * PARAMETERS / 8;
        assert_eq!(gib(documented), 15.93);
        assert_ne!(zero2(PARAMETERS, NODE, false).device, documented);
    }

    #[test]
    fn more_nodes_share_the_work() {
        let nodes = Nodes { nodes: 4, devices: 2 };
        assert_eq!(zero2(800, nodes, true), Estimate { device: 1600, host: 800 * 32 * 3 / 2 });
        assert_eq!(zero2(800, nodes, false), Estimate { device: 1600 + 1800, host: 800 * 8 * 3 / 2 });
        let offloaded = zero3(800, 10, nodes, Offload::All, true);
        assert_eq!(offloaded, Estimate { device: 40, host: 800 * 18 / 4 * 3 / 2 });
        let whole = zero3(800, 10, nodes, Offload::Optimizer, false);
        assert_eq!(whole, Estimate { device: 40 + 200, host: 800 * 8 * 3 / 2 });
        let one = Nodes { nodes: 1, devices: 1 };
        assert_eq!(zero3(800, 10, one, Offload::Optimizer, false).host, 800 * 16 * 3 / 2);
        assert_eq!(zero2(800, one, true).host, 800 * 16 * 3 / 2);
    }
}
