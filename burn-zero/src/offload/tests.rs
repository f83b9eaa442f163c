use super::*;
use crate::optimizer::{AdamW, Lion};

fn piece(n: usize, k: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + k * 101) as f32).sin()).collect()
}

fn snapshot(offload: &Offload, id: ParamId) -> Snapshot {
    let moments = [0, 1].map(|slot| offload.moment(id, slot).into_owned());
    offload.check_reads().unwrap();
    Snapshot { step: offload.step(id).unwrap(), moments, scales: None }
}

/// Parameters and both moments after some updates; with a stop, a state that was saved and restored in between.
fn run(tier: &Tier, sizes: &[usize], stop: Option<usize>) -> Vec<(Vec<f32>, [Vec<f32>; 2])> {
    let new = || Offload::new(Optimizer::AdamW(AdamW::default()), tier, 0).unwrap();
    let (mut offload, mut values): (_, Vec<_>) = (new(), sizes.iter().map(|&n| piece(n, 1000)).collect());
    let id = |i: usize| ParamId::from(i as u64);
    for step in 0..4 {
        let rates = Rates { lr: 1e-2, weight_decay: 0.1, scale: 0.5 };
        for (i, (value, &n)) in values.iter_mut().zip(sizes).enumerate() {
            offload.update((id(i), n), rates, (value, &piece(n, step))).unwrap();
        }
        offload.settle().unwrap();
        if stop == Some(step) {
            let mut next = new();
            for (i, &n) in sizes.iter().enumerate() {
                next.restore((id(i), n), snapshot(&offload, id(i))).unwrap();
            }
            offload = next;
        }
    }
    let moments = |i| snapshot(&offload, id(i)).moments;
    values.into_iter().enumerate().map(|(i, value)| (value, moments(i))).collect()
}

#[test]
fn a_file_holds_what_memory_holds() {
    let folder = tempfile::tempdir().unwrap();
    let tier = Tier::File(folder.path().join("states"));
    // Less than a block of the file, exactly one, several and a rest.
    let sizes = [1, 3000, 256 << 10, (256 << 10) * 3 + 17];
    let memory = run(&Tier::Host, &sizes, None);
    for stop in [None, Some(1)] {
        assert!(run(&tier, &sizes, stop) == memory, "stopped after {stop:?}");
        assert!(run(&Tier::Host, &sizes, stop) == memory, "stopped after {stop:?}");
    }
    let left = folder.path().join("states").read_dir().unwrap().count();
    assert_eq!(left, 0, "the file goes with its process");
}

#[test]
fn what_the_host_cannot_do_is_refused() {
    let error = Offload::new(Optimizer::Lion(Lion::default()), &Tier::Host, 0).err().unwrap();
    assert!(error.to_string().contains("Adam or AdamW"), "{error}");
    let error = Offload::new(Optimizer::AdamW(AdamW::default()), &Tier::File("/dev/null/x".into()), 0).err().unwrap();
    assert!(matches!(error, Error::Path { .. }), "{error}");
}

#[test]
fn deepspeed_s_devices_are_tiers() {
    use crate::ds_config::{Device, Offload as Settings};
    let tier = |device, folder: Option<&str>| Tier::from(&Settings { device, nvme_path: folder.map(Into::into) });
    assert_eq!(tier(Device::None, None), Tier::Device);
    assert_eq!(tier(Device::Cpu, None), Tier::Host);
    assert_eq!(tier(Device::Nvme, Some("/fast")), Tier::File("/fast".into()));
}
