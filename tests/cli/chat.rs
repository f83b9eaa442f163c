//! Tests of sampling in `chat`.

use crate::work::WorkDir;

#[test]
fn draws_follow_the_seed_and_end_at_stop_strings() {
    let work = WorkDir::new();
    let chat = |extra: &[&str]| {
        let base = ["chat", "--model", "model", "--prompt", "Hi", "--max-new-tokens", "24"];
        work.succeed(&[&base[..], extra].concat()).stdout
    };
    let hot = |extra: &[&str]| chat(&[&["--temperature", "1.5"], extra].concat());
    let one = hot(&["--seed", "1"]);
    assert_eq!(one, hot(&["--seed", "1"]));
    assert_ne!(one, hot(&["--seed", "2"]));
    assert_eq!(hot(&["--top-k", "1"]), chat(&[]), "one token to draw from is the likeliest");
    let stop: String = one.trim_end().chars().skip(2).take(2).collect();
    let stopped = hot(&["--seed", "1", "--stop", &stop]);
    assert_eq!(stopped.trim_end_matches('\n'), &one[..one.find(&stop).unwrap()]);
}
