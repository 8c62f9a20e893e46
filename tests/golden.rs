//! Imported models compute what PyTorch computes: logits, hidden states, and the greedy continuation token for token.

use awqc::exec::Logits;
use awqc::generate::{Settings, generate, session};
use awqc::interrupt::Interrupt;
use awqc::ir::Region;
use awqc::model::Model;
use awqc::sample::Sampling;

use crate::models::{Expected, folders, largest_difference, name, reference};

/// A wrong epsilon gives 2e-4, the wrong form of gelu 1e-3: a looser bound would hide them.
const BOUND: f32 = 1e-4;

#[test]
fn logits_and_hidden_states_agree() {
    for folder in folders() {
        let (name, expected) = (name(&folder), Expected::read(&folder));
        let model = Model::open(&folder).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut session = session(&model).unwrap_or_else(|e| panic!("{name}: {e}"));
        let ids = expected.ids();
        let ids: Vec<&[i32]> = ids.iter().map(Vec::as_slice).collect();
        let mut seen = Vec::new();
        if let Some(pixels) = expected.pixels(None) {
            let mut keep = |region: &Region, tensor| {
                seen.push((region.name.to_string(), tensor));
                Ok(())
            };
            session.see(pixels, &mut keep).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        for (i, (region, tensor)) in seen.iter().enumerate() {
            let what = if i + 1 == seen.len() { "image_features".into() } else { format!("vision.hidden.{i}") };
            let (shape, want) = expected.floats.get(&what).unwrap_or_else(|| panic!("{name}: no {what} for {region}"));
            assert_eq!(&tensor.shape, shape, "{name}: shape of {what}");
            let scale = want.iter().fold(1.0f32, |m, v| m.max(v.abs()));
            let worst = largest_difference(&tensor.data, want);
            assert!(worst <= BOUND * scale, "{name}: {what} differs by {worst}");
        }
        assert_eq!(seen.is_empty(), !expected.floats.contains_key("image_features"), "{name}: images");
        let mut hidden = Vec::new();
        let logits = session
            .trace(&ids, Logits::All, &mut |_, tensor| {
                hidden.push(tensor);
                Ok(())
            })
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        for (i, tensor) in hidden.iter().enumerate() {
            let (shape, want) = &expected.floats[&format!("hidden.{i}")];
            assert_eq!(&tensor.shape, shape, "{name}: shape of hidden state {i}");
            let scale = want.iter().fold(1.0f32, |m, v| m.max(v.abs()));
            let worst = largest_difference(&tensor.data, want);
            assert!(worst <= BOUND * scale, "{name}: hidden state {i} differs by {worst}");
        }
        assert!(!expected.floats.contains_key(&format!("hidden.{}", hidden.len())), "{name}: too few layers");
        let worst = largest_difference(&logits.data, &expected.floats["logits"].1);
        assert!(worst <= BOUND, "{name}: logits differ by {worst}");
    }
}

#[test]
fn greedy_continuations_agree_token_for_token() {
    for folder in folders() {
        let (name, expected) = (name(&folder), Expected::read(&folder));
        let (prompt, want): (Vec<i32>, Vec<i32>) = match expected.ints.get("generated") {
            Some((_, new)) => {
                let prompt =
                    expected.ints.get("prompt").map_or(expected.ids()[0][..6].to_vec(), |(_, ids)| ids.clone());
                (prompt, new.clone())
            }
            None => {
                let text = std::fs::read_to_string(folder.join("generate.json")).expect("generate.json");
                let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
                let ids = |key: &str| {
                    json[key].as_array().expect("ids").iter().map(|v| v.as_i64().expect("an id") as i32).collect()
                };
                (ids("prompt_ids"), ids("new_ids"))
            }
        };
        let model = Model::open(&folder).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut session = reference(&model, &expected);
        let settings = Settings { max_tokens: want.len(), stop: Vec::new(), sampling: Sampling::GREEDY, seed: 0 };
        let got = generate(&mut session, &prompt, &settings, &Interrupt::default(), &mut |_| true);
        assert_eq!(got.unwrap_or_else(|e| panic!("{name}: {e}")), want, "{name}");
    }
}
