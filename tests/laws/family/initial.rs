//! Initial values of LoRA's matrices equal PEFT's.

use super::*;

fn qv(init_lora_weights: InitLoraWeights) -> LoraConfig {
    let target_modules = TargetModules::Suffixes(["q_proj", "v_proj", "up_proj"].map(String::from).to_vec());
    LoraConfig { r: 4, lora_alpha: 6.0, target_modules, init_lora_weights, ..LoraConfig::default() }
}

#[test]
fn starts_change_nothing_but_false() {
    let base_reference = tensors("models/gqa_llama3/reference.safetensors");
    let pissa = |niter| qv(InitLoraWeights::Pissa { niter });
    for (config, unchanged) in [
        (qv(InitLoraWeights::True), true),
        (qv(InitLoraWeights::Gaussian), true),
        (qv(InitLoraWeights::Orthogonal), true),
        (pissa(None), true),
        (pissa(Some(4)), true),
        (LoraConfig { use_dora: true, ..qv(InitLoraWeights::True) }, true),
        (LoraConfig { use_dora: true, ..qv(InitLoraWeights::Gaussian) }, true),
        (LoraConfig { use_dora: true, ..pissa(None) }, true),
        (qv(InitLoraWeights::False), false),
    ] {
        let mut model = base::<Flex>("gqa_llama3");
        adapter::attach(&mut model, "default", &config, 3).unwrap();
        let difference = row_logits_differ(&model, &base_reference);
        // 1e-4 is also the tolerance for the base model's own logits.
        assert_eq!(difference < 1e-4, unchanged, "{config:?}: {difference:e}");
    }
    let mut model = base::<Flex>("gqa_llama3");
    adapter::attach_ia3(&mut model, "default", &Ia3Config::default()).unwrap();
    assert!(row_logits_differ(&model, &base_reference) < 1e-4);
}

#[test]
fn starts_split_the_weights_as_peft_s_and_become_plain_lora() {
    for (name, init) in [("pissa", InitLoraWeights::Pissa { niter: None }), ("olora", InitLoraWeights::Olora)] {
        let residual = tensors(&format!("family/{name}/residual.safetensors"));
        let config = qv(init);
        for seed in [0, 11] {
            let (mut model, mut seen) = (base::<Flex>("gqa_llama3"), 0);
            adapter::attach(&mut model, "default", &config, seed).unwrap();
            model.linears(&mut |path, linear| {
                if let Some(expected) = residual.get(&format!("{path}.weight")) {
                    let difference = max_diff(&floats(&linear.weight.val().into_data()), &floats(expected));
                    assert!(difference < 1e-5, "{name}: {path} from seed {seed}: {difference:e}");
                    seen += 1;
                }
            });
            assert_eq!(seen, residual.len());
        }
        let (temporary, mut model) = (tempfile::tempdir().unwrap(), base::<Flex>("gqa_llama3"));
        load_adapter(&mut model, name);
        let (initial, converted) = (format!("{name}_initial"), format!("{name}_converted"));
        let places =
            (directory(&initial), temporary.path().join("from the model"), temporary.path().join("from files"));
        adapter::save_mutated_as_lora(&model, "default", &places.0, &places.1).unwrap();
        let trained = directory(name);
        adapter::convert_mutated_to_lora::<Flex>(&trained, &places.0, &places.2, &Default::default()).unwrap();
        for out in [&places.1, &places.2] {
            same_files(out, &directory(&converted), 1e-6, &converted);
            let mut plain = base::<Flex>("gqa_llama3");
            adapter::load(&mut plain, "default", out).unwrap();
            assert!(row_logits_differ(&plain, &reference(name)) < 1e-4, "{name}: converted");
        }
    }
    let mut model = base::<Flex>("gqa_llama3");
    for init in [InitLoraWeights::Pissa { niter: None }, InitLoraWeights::Olora] {
        let config = LoraConfig { r: 33, ..qv(init) };
        let error = adapter::attach(&mut model, "default", &config, 0).unwrap_err().to_string();
        assert!(error.contains("`r`") && error.contains("found 33") && error.contains("q_proj"), "{error}");
    }
}
