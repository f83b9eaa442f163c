//! The device to which states are offloaded.

use super::MemoryTier;
use std::path::Path;

/// The device to which states are offloaded, by DeepSpeed's names: `none`, `cpu` or `nvme`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OffloadDevice {
    /// No offload: on the device that trains.
    #[default]
    None,
    /// In host memory; optimizer states are updated by the CPU.
    Cpu,
    /// In a file, which is read and written through a few buffers.
    Nvme,
}

impl OffloadDevice {
    /// Returns the memory tier of this device; `folder` is the folder of the files for [`OffloadDevice::Nvme`], which
    /// without one is host memory.
    pub fn tier(self, folder: Option<&Path>) -> MemoryTier {
        match (self, folder) {
            (Self::None, _) => MemoryTier::Device,
            (Self::Nvme, Some(folder)) => MemoryTier::File(folder.to_owned()),
            (Self::Cpu | Self::Nvme, _) => MemoryTier::Host,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deepspeed_s_devices_are_tiers() {
        assert_eq!(OffloadDevice::None.tier(None), MemoryTier::Device);
        assert_eq!(OffloadDevice::Cpu.tier(None), MemoryTier::Host);
        assert_eq!(OffloadDevice::Nvme.tier(Some(Path::new("/fast"))), MemoryTier::File("/fast".into()));
    }
}
