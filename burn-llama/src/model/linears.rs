//! The linear layers of the model by path.

use super::{Llama, build::parameter_shapes};
use crate::kernel::Kernels;
use burn::{
    module::Param,
    tensor::{Tensor, s},
};
use burn_peft::{Embedding, Linear, Linears, Prompt, Weight, param};

/// The path of the token embedding.
const EMBEDDING: &str = "model.embed_tokens";

impl<B: Kernels> Llama<B> {
    /// Replaces packed weights by the f32 values that they stand for, frozen; adapters can be merged into these.
    pub fn unpacked(mut self) -> Self {
        let unpack = |weight: &mut Weight<B>| *weight = weight.clone().unpacked();
        self.linears_mut(&mut |_, linear| unpack(&mut linear.weight));
        unpack(&mut self.model.embed_tokens.weight);
        self
    }
}

impl<B: Kernels> Linears<B> for Llama<B> {
    fn linears(&self, visit: &mut dyn FnMut(&str, &Linear<B>)) {
        for (index, layer) in self.model.layers.iter().enumerate() {
            let (attention, mlp) = (&layer.self_attn, &layer.mlp);
            for (name, linear) in [
                ("self_attn.q_proj", &attention.q_proj),
                ("self_attn.k_proj", &attention.k_proj),
                ("self_attn.v_proj", &attention.v_proj),
                ("self_attn.o_proj", &attention.o_proj),
                ("mlp.gate_proj", &mlp.gate_proj),
                ("mlp.up_proj", &mlp.up_proj),
                ("mlp.down_proj", &mlp.down_proj),
            ] {
                visit(&format!("model.layers.{index}.{name}"), linear);
            }
        }
        if let Some(head) = &self.lm_head {
            visit("lm_head", head);
        }
    }

    fn embedding(&self) -> Option<(&str, &Embedding<B>)> {
        Some((EMBEDDING, &self.model.embed_tokens))
    }

    fn embedding_mut(&mut self) -> Option<(&str, &mut Embedding<B>)> {
        Some((EMBEDDING, &mut self.model.embed_tokens))
    }

    fn resize_token_embeddings(&mut self, rows: usize) {
        let resize = |weight: &mut Weight<B>, path: &str, elsewhere: bool| {
            let trained = matches!(weight, Weight::Dense(param) if param.is_require_grad());
            let values = weight.val().detach();
            let values = if elsewhere { values.slice(s![0..1, 0..1]) } else { resize_rows(values, rows) };
            *weight = Weight::Dense(Param::initialized(
                param::id(&format!("{path}.weight")),
                values.detach().set_require_grad(trained),
            ));
        };
        let table = &mut self.model.embed_tokens;
        let elsewhere = table.is_elsewhere();
        resize(&mut table.weight, EMBEDDING, elsewhere);
        table.resize_elsewhere(rows);
        if let Some(head) = &mut self.lm_head {
            let elsewhere = head.is_elsewhere();
            resize(&mut head.weight, "lm_head", elsewhere);
            head.resize_elsewhere(rows);
        }
        self.config.vocab_size = rows;
        self.config.raw_fields.insert("vocab_size".to_owned(), rows.into());
    }

    fn prompts(&self) -> &[Prompt<B>] {
        &self.prompts
    }

    fn prompts_mut(&mut self) -> Option<&mut Vec<Prompt<B>>> {
        Some(&mut self.prompts)
    }

    fn tied(&self) -> Option<[&str; 2]> {
        self.lm_head.is_none().then_some([EMBEDDING, "lm_head"])
    }

    fn untie(&mut self) {
        if self.lm_head.is_none() {
            let weight = self.model.embed_tokens.weight.with_path("lm_head.weight");
            let (head, shape) = (Linear::from_weight("lm_head", weight, None), self.model.embed_tokens.shape());
            self.config.untie();
            // The first and the last stage held the table; each keeps one of the two.
            let place = |path: &str| self.held.holds(&self.config, path);
            self.lm_head = Some(if place("lm_head") { head } else { head.into_placeholder(shape) });
            if !place(EMBEDDING) {
                let table = self.model.embed_tokens.clone();
                self.model.embed_tokens = table.into_placeholder(shape);
            }
        }
    }

    fn shape_elsewhere(&self, path: &str) -> Option<Vec<usize>> {
        if self.held.holds(&self.config, path) {
            return None;
        }
        parameter_shapes(&self.config).into_iter().find(|(name, _)| name == path).map(|(_, shape)| shape)
    }

    fn linears_mut(&mut self, visit: &mut dyn FnMut(&str, &mut Linear<B>)) {
        for (index, layer) in self.model.layers.iter_mut().enumerate() {
            let (attention, mlp) = (&mut layer.self_attn, &mut layer.mlp);
            for (name, linear) in [
                ("self_attn.q_proj", &mut attention.q_proj),
                ("self_attn.k_proj", &mut attention.k_proj),
                ("self_attn.v_proj", &mut attention.v_proj),
                ("self_attn.o_proj", &mut attention.o_proj),
                ("mlp.gate_proj", &mut mlp.gate_proj),
                ("mlp.up_proj", &mut mlp.up_proj),
                ("mlp.down_proj", &mut mlp.down_proj),
            ] {
                visit(&format!("model.layers.{index}.{name}"), linear);
            }
        }
        if let Some(head) = &mut self.lm_head {
            visit("lm_head", head);
        }
    }
}

/// Cuts `table [n, features]` off after the given number of rows, or adds rows with the mean of the others.
fn resize_rows<B: Kernels>(table: Tensor<B, 2>, rows: usize) -> Tensor<B, 2> {
    let [before, _] = table.dims();
    if rows <= before {
        return table.slice(s![0..rows, ..]);
    }
    let mean = table.clone().mean_dim(0).repeat_dim(0, rows - before);
    Tensor::cat(vec![table, mean], 0)
}
