//! DeepSpeed's estimates of the memory of model states, as its code computes them (`runtime/zero/stage_1_and_2.py` and
//! `stage3.py`; the numbers in its documentation come from an older formula).

/// The machines of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cluster {
    /// The number of machines.
    pub nodes: u64,
    /// The number of devices per machine.
    pub devices_per_node: u64,
}

/// The model states that are kept in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuOffload {
    /// No states.
    None,
    /// Optimizer states.
    Optimizer,
    /// Optimizer states and parameters.
    All,
}

/// The bytes of parameters, gradients and optimizer states, without activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeepSpeedEstimate {
    /// The bytes on each device.
    pub device: u64,
    /// The bytes on each host, including buffers (half as much again).
    pub host: u64,
}

/// Multiplies by 1.5, the default of DeepSpeed's `additional_buffer_factor`.
fn with_buffer_factor(bytes: u64) -> u64 {
    bytes * 3 / 2
}

/// Computes DeepSpeed's `estimate_zero2_model_states_mem_needs` for `parameters` weights; `offload` moves the optimizer
/// states to the host.
///
/// # Panics
/// If the number of machines or of devices is 0.
pub fn zero2(parameters: u64, nodes: Cluster, offload: bool) -> DeepSpeedEstimate {
    let world = nodes.nodes * nodes.devices_per_node;
    if offload {
        // Per weight: two bytes on the device; on the host the larger of four bytes for each rank and 16 for weight,
        // gradient and moments.
        DeepSpeedEstimate { device: 2 * parameters, host: with_buffer_factor(parameters * (4 * world).max(16)) }
    } else {
        DeepSpeedEstimate {
            device: 2 * parameters + 18 * parameters / world,
            host: with_buffer_factor(parameters * 4 * nodes.devices_per_node),
        }
    }
}

/// Computes DeepSpeed's `estimate_zero3_model_states_mem_needs` for `parameters` weights, of which the largest layer
/// has `largest_layer`. With `init` the model is created shard by shard (`zero.Init`); otherwise every process first
/// holds all of it.
///
/// # Panics
/// If the number of machines or of devices is 0.
pub fn zero3(
    parameters: u64,
    largest_layer: u64,
    nodes: Cluster,
    offload: CpuOffload,
    init: bool,
) -> DeepSpeedEstimate {
    let world = nodes.nodes * nodes.devices_per_node;
    let (sharded, per_weight) = match offload {
        CpuOffload::All => (0, 18),
        CpuOffload::Optimizer => (2 * parameters / world, 16),
        CpuOffload::None => (18 * parameters / world, 0),
    };
    let copies = 4 * nodes.devices_per_node;
    let host = match (offload, init) {
        (CpuOffload::None, true) => largest_layer * copies,
        (_, true) => parameters * per_weight / nodes.nodes,
        (_, false) => (parameters * per_weight / nodes.nodes).max(parameters * copies),
    };
    DeepSpeedEstimate { device: 4 * largest_layer + sharded, host: with_buffer_factor(host) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Cluster = Cluster { nodes: 1, devices_per_node: 8 };
    /// The number of parameters of T5-3B, DeepSpeed's example.
    const PARAMETERS: u64 = 2_851_000_000;
    const LARGEST: u64 = 32_000_000;

    fn gib(bytes: u64) -> f64 {
        (bytes as f64 / (1u64 << 30) as f64 * 100.0).round() / 100.0
    }

    #[test]
    fn every_golden_number_holds() {
        // The table: (estimate, host GiB, device GiB).
        let three = |offload, init| zero3(PARAMETERS, LARGEST, NODE, offload, init);
        let table = [
            (zero2(PARAMETERS, NODE, true), 127.45, 5.31),
            (zero2(PARAMETERS, NODE, false), 127.45, 11.28),
            (three(CpuOffload::All, true), 71.69, 0.12),
            (three(CpuOffload::All, false), 127.45, 0.12),
            (three(CpuOffload::Optimizer, true), 63.72, 0.78),
            (three(CpuOffload::Optimizer, false), 127.45, 0.78),
            (three(CpuOffload::None, true), 1.43, 6.09),
            (three(CpuOffload::None, false), 127.45, 6.09),
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
        let nodes = Cluster { nodes: 4, devices_per_node: 2 };
        assert_eq!(zero2(800, nodes, true), DeepSpeedEstimate { device: 1600, host: 800 * 32 * 3 / 2 });
        assert_eq!(zero2(800, nodes, false), DeepSpeedEstimate { device: 1600 + 1800, host: 800 * 8 * 3 / 2 });
        let offloaded = zero3(800, 10, nodes, CpuOffload::All, true);
        assert_eq!(offloaded, DeepSpeedEstimate { device: 40, host: 800 * 18 / 4 * 3 / 2 });
        let whole = zero3(800, 10, nodes, CpuOffload::Optimizer, false);
        assert_eq!(whole, DeepSpeedEstimate { device: 40 + 200, host: 800 * 8 * 3 / 2 });
        let one = Cluster { nodes: 1, devices_per_node: 1 };
        assert_eq!(zero3(800, 10, one, CpuOffload::Optimizer, false).host, 800 * 16 * 3 / 2);
        assert_eq!(zero2(800, one, true).host, 800 * 16 * 3 / 2);
    }
}
