//! Fuzzes the recipe parser: a valid recipe that is written and parsed again must be unchanged.
#![no_main]

use libfuzzer_sys::fuzz_target;
use medqa::recipe::Recipe;
use std::path::Path;

fuzz_target!(|text: &str| {
    let path = Path::new("recipe.toml");
    let Ok(recipe) = Recipe::parse(text, path, &[]) else { return };
    let written = recipe.to_toml().expect("a legal recipe can be written");
    let again = Recipe::parse(&written, path, &[]).expect("a written recipe is legal");
    // NaN values never compare equal, so the texts are compared.
    assert_eq!(again.to_toml().expect("a legal recipe can be written"), written);
});
