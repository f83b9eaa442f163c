//! Trains a prefix and LoRA on a custom model: `cargo run --release -p burn-peft --example foreign`.
use burn::backend::{Autodiff, Flex};
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::{module::Module, tensor::activation::softmax, tensor::*};
use burn_peft::prompt::{BaseShape, Prompt, PromptConfig};
use burn_peft::{AdapterModel, ForwardContext, Linear, LinearKernels, Linears, LoraConfig, adapter};
#[derive(Module, Debug)]
struct Attention<B: LinearKernels> {
    q_proj: Linear<B>,
    prompt: Prompt<B>,
}
impl<B: LinearKernels> Linears<B> for Attention<B> {
    fn linears(&self, visit: &mut dyn FnMut(&str, &Linear<B>)) {
        visit("q_proj", &self.q_proj);
    }
    fn linears_mut(&mut self, visit: &mut dyn FnMut(&str, &mut Linear<B>)) {
        visit("q_proj", &mut self.q_proj);
    }
}
fn main() -> Result<(), burn_peft::Error> {
    let (device, context, lora) = (Default::default(), ForwardContext::default(), LoraConfig::default());
    let random = |rows| Tensor::<Autodiff<Flex>, 2>::random([rows, 8], Distribution::Default, &device);
    let (x, target, [hidden_size, head_dim]) = (random(5), random(5), [8; 2]);
    let base =
        BaseShape { hidden_size, num_hidden_layers: 1, num_attention_heads: 1, num_key_value_heads: 1, head_dim };
    let prompt = Prompt::new(&PromptConfig::prefix(4), base, 0, &device)?;
    let model = Attention { q_proj: Linear::new("q_proj", random(8), None), prompt };
    let (mut model, mut adam) = (adapter::attach_and_freeze(model, "default", &lora)?, AdamConfig::new().init());
    for step in 0..100 {
        // The layer's prefix: [virtual tokens, 2 (key, value), heads, head_dim].
        let seen = model.prompt.encode(&context).past_key_values.remove(0);
        let part = |i: usize| seen.clone().slice(s![.., i..i + 1]).reshape([4, 8]);
        let [k, v] = [0, 1].map(|i| Tensor::cat(vec![part(i), x.clone()], 0));
        let y = softmax(model.q_proj.forward(x.clone(), &context).matmul(k.transpose()), 1).matmul(v);
        let loss = (y - target.clone()).powi_scalar(2).mean();
        println!("step {step}: loss {}", loss.clone().into_scalar());
        model = adam.step(1e-2, model.clone(), GradientsParams::from_grads(loss.backward(), &model));
    }
    model.save_adapter("default", &std::env::temp_dir().join("foreign-lora"))
}
