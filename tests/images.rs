//! Models that take images, as a user runs them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use awqc::exec::Logits;
use awqc::generate::session;
use awqc::images::{Preparation, pixels};
use awqc::model::Model;
use image::{Rgb, RgbImage};
use serde_json::{Value as Json, json};

use crate::cli::{awqc, golden, json as answer, path, scratch};
use crate::models::Expected;

/// Copies a folder, and the folders in it.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder").flatten() {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, &to).expect("a copy");
        }
    }
}

/// A golden with a tokenizer, in which the word `w7` is token 7, and settings for images. Returns the model and the
/// file with token windows for calibration, which hold no image tokens.
pub(crate) fn ready(dir: &tempfile::TempDir, name: &str) -> (String, String) {
    let (model, ids) = (path(dir, name), path(dir, "ids.safetensors"));
    copy(Path::new(&golden(name)), Path::new(&model));
    let vocabulary: BTreeMap<String, u32> = (0..160).map(|i| (format!("w{i}"), i)).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    let settings = json!({
        "do_resize": true, "size": {"shortest_edge": 14}, "resample": 3, "do_center_crop": true,
        "crop_size": {"height": 14, "width": 14}, "do_rescale": true, "rescale_factor": 1.0 / 255.0,
        "do_normalize": true, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    });
    for (file, value) in [("tokenizer.json", tokenizer), ("preprocessor_config.json", settings)] {
        fs::write(Path::new(&model).join(file), value.to_string()).expect("written");
    }
    let text: Vec<u8> = (0..128i64).flat_map(|i| (3 + i * 37 % 150).to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![4, 32], &text).expect("a tensor");
    safetensors::serialize_to_file([("input_ids", view)], None, Path::new(&ids)).expect("written");
    (model, ids)
}

/// An image that no two places of look alike.
pub(crate) fn photo(dir: &tempfile::TempDir, name: &str) -> String {
    let file = path(dir, name);
    let seed = name.len() as u32;
    let pixel = |x: u32, y: u32| Rgb([(x * 11 + seed) as u8, (y * 17 + x) as u8, (x * y * seed) as u8]);
    RgbImage::from_fn(20, 16, pixel).save(&file).expect("written");
    file
}

/// The greedy continuation that a session gives.
fn expected(model: &str, images: &[String], ids: &[i32], count: usize) -> Vec<i64> {
    let model = Model::open(Path::new(model)).expect("a model");
    let takes = model.module.images().expect("images");
    let files: Vec<_> = images.iter().map(Into::into).collect();
    let mut session = session(&model).expect("a session");
    session.see(pixels(&model, &takes, &files).expect("pixels"), &mut |_, _| Ok(())).expect("it sees");
    let mut ids = ids.to_vec();
    let mut out = Vec::new();
    for _ in 0..count {
        let logits = session.forward(&ids, Logits::Last).expect("logits").data;
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("a token");
        out.push(best as i64);
        ids = vec![best as i32];
    }
    out
}

fn ints(value: &Json) -> Vec<i64> {
    value.as_array().expect("a list").iter().map(|v| v.as_i64().expect("an id")).collect()
}

#[test]
fn a_prompt_with_an_image_is_continued_by_the_checkpoint_and_by_what_was_compiled() {
    let dir = scratch();
    let (model, ids) = ready(&dir, "llava");
    let (image, out) = (photo(&dir, "a.png"), path(&dir, "out"));
    let run = |model: &str, more: &[&str]| {
        let args = ["run", model, "--prompt", "w5 <image> w6 w7", "--max-tokens", "6", "--json", "-q"];
        answer(&[&args[..], more].concat())
    };
    let got = run(&model, &["--image", &image]);
    let want: Vec<i32> = [vec![5], vec![159; 9], vec![6, 7]].concat();
    assert_eq!(ints(&got["prompt_ids"]), want.iter().map(|i| i64::from(*i)).collect::<Vec<_>>());
    assert_eq!(ints(&got["ids"]), expected(&model, std::slice::from_ref(&image), &want, 6));
    // Another image, another text; none, a text of its own.
    let other = run(&model, &["--image", &photo(&dir, "other.png")]);
    let jpeg = run(&model, &["--image", &photo(&dir, "a.jpg")]);
    assert!(got["ids"] != other["ids"] || got["ids"] != jpeg["ids"], "the images make no difference");
    answer(&["run", &model, "--prompt", "w5 w6 w7", "--max-tokens", "3", "--json", "-q"]);

    let done = awqc(&["compile", &model, "--group", "16", "--calib-ids", &ids, "-o", &out, "-q", "--json"]);
    assert_eq!(done.code, 0, "{}", done.err);
    let report: Json = serde_json::from_str(&done.out).expect("JSON");
    // The language model is quantized, what sees images is not.
    let count = |text: &str| text.lines().filter(|l| l.contains(": u4g16")).count();
    let text = fs::read_to_string(Path::new(&out).join("module.awqir")).expect("a module");
    let (eye, language) = text.split_at(text.find("region @embed").expect("a region"));
    assert!(count(eye) == 0 && count(language) > 0, "{text}");
    assert!(report["sites"].as_array().is_some_and(|s| !s.is_empty()));
    let compiled = run(&out, &["--image", &image]);
    assert_eq!(ints(&compiled["ids"]), expected(&out, &[image], &want, 6));
    let eval = answer(&["eval", &out, "--ids", &ids, "--against", &model, "--json", "-q"]);
    assert!(eval["kl_divergence"].as_f64().expect("a number") < 0.3, "{eval}");
}

/// The eye is the reference executor's in any case; the text behind it runs on packed weights.
#[test]
fn packed_models_see_images() {
    let dir = scratch();
    for name in ["llava", "vila"] {
        let (model, ids) = ready(&dir, name);
        let (images, out) = ([photo(&dir, "a.png"), photo(&dir, "bcd.png")], path(&dir, "out"));
        let made = ["compile", &model, "--target", "cpu-native", "--group", "16", "--calib-ids", &ids, "-o", &out];
        let done = awqc(&[&made[..], &["-q", "--force"]].concat());
        assert_eq!(done.code, 0, "{name}: {}", done.err);
        let args = ["run", &out, "--prompt", "<image> w5 w6 <image> w7", "--image", &images[0], "--image", &images[1]];
        let got = answer(&[&args[..], &["--max-tokens", "6", "--act", "f32", "--json", "-q"]].concat());
        let prompt: Vec<i32> = ints(&got["prompt_ids"]).iter().map(|id| *id as i32).collect();
        assert!(prompt.iter().filter(|id| **id == 159).count() >= 8, "{name}: {prompt:?}");
        assert_eq!(ints(&got["ids"]), expected(&out, &images, &prompt, 6), "{name}");
        let text = ["run", &out, "--prompt", "w5 w6 w7", "--max-tokens", "3", "--json", "-q"];
        answer(&text);
        let done = awqc(&["run", &out, "--prompt", "w1 w159", "--max-tokens", "2"]);
        assert_eq!(done.code, 4, "{name}: {}", done.err);
        assert!(done.err.contains("1 image tokens (159), 0 images"), "{name}: {}", done.err);
    }
}

#[test]
fn several_images_stand_where_the_prompt_says() {
    let dir = scratch();
    let (model, ids) = ready(&dir, "openflamingo");
    let images = [photo(&dir, "a.png"), photo(&dir, "bcd.png")];
    let args = ["run", &model, "--prompt", "<image> w5 w6 <image> w7", "--image", &images[0], "--image", &images[1]];
    let got = answer(&[&args[..], &["--max-tokens", "5", "--json", "-q"]].concat());
    assert_eq!(ints(&got["prompt_ids"]), [159, 5, 6, 159, 7]);
    assert_eq!(ints(&got["ids"]), expected(&model, &images, &[159, 5, 6, 159, 7], 5));
    let out = path(&dir, "out");
    let done = awqc(&["compile", &model, "--group", "12", "--calib-ids", &ids, "-o", &out, "-q"]);
    assert_eq!(done.code, 0, "{}", done.err);
    let compiled = answer(&[&["run", &out], &args[2..], &["--max-tokens", "5", "--json", "-q"]].concat());
    assert_eq!(ints(&compiled["ids"]), expected(&out, &images, &[159, 5, 6, 159, 7], 5));
}

#[test]
fn a_chat_template_says_where_images_stand() {
    let dir = scratch();
    let (model, _) = ready(&dir, "llava");
    let (image, template) = (photo(&dir, "a.png"), Path::new(&model).join("chat_template.json"));
    let chat = |prompt: &str| {
        let args =
            ["run", &model, "--chat", "--prompt", prompt, "--image", &image, "--max-tokens", "1", "--json", "-q"];
        ints(&answer(&args)["prompt_ids"])
    };
    // Parts, images first; and a template that knows nothing of parts.
    let parts = "w1 {% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image> {% endfor %}\
                 {% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}{% endfor %} w2";
    let plain = "w1 {% for m in messages %}{{ m['content'] }}{% endfor %} w2";
    for (text, prompt, before, after) in [
        (parts, "w7", &[1][..], &[7, 2][..]),
        (parts, "w7 <image> w8", &[1], &[7, 8, 2]),
        (plain, "w7", &[1], &[7, 2]),
        (plain, "w7 <image> w8", &[1, 7], &[8, 2]),
    ] {
        fs::write(&template, json!({ "chat_template": text }).to_string()).expect("written");
        assert_eq!(chat(prompt), [before, &[159; 9], after].concat(), "{text} {prompt}");
    }
}

#[test]
fn what_cannot_be_seen_is_said() {
    let dir = scratch();
    let (model, ids) = ready(&dir, "llava");
    let image = photo(&dir, "a.png");
    let fails = |args: &[&str], code: i32, words: &[&str]| {
        let done = awqc(args);
        assert_eq!(done.code, code, "{args:?}: {}", done.err);
        words.iter().for_each(|word| assert!(done.err.contains(word), "no `{word}` in: {}", done.err));
    };
    let run = |prompt: &'static str, image: &str| {
        ["run", &model, "--prompt", prompt, "--max-tokens", "2", "--image", image].map(str::to_owned)
    };
    let refuse = |args: [String; 8], code: i32, words: &[&str]| {
        fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), code, words);
    };
    refuse(run("w1 <image> w2 <image>", &image), 2, &["2 places for images", "images given: 1"]);
    refuse(run("w1", &ids), 4, &["ids.safetensors", "PNG and JPEG"]);
    refuse(run("w1", "no-such.png"), 4, &["no-such.png"]);
    // A text that speaks of an image that is not there.
    fails(&["run", &model, "--prompt", "w1 w159", "--max-tokens", "2"], 4, &["1 image tokens (159)", "0 images"]);
    let (text, _) = ready(&dir, "llama");
    fails(&["run", &text, "--prompt", "w1", "--image", &image], 2, &["text alone", "leave it out"]);
    let (attends, _) = ready(&dir, "openflamingo");
    for (target, out) in [("cpu-native", "cpu"), ("cuda-sm89", "cuda")] {
        let out = path(&dir, out);
        let args = ["compile", &attends, "--target", target, "--group", "12", "--calib-ids", &ids, "-o", &out, "-q"];
        fails(&args, 3, &["@embed", "count", "attention of a text to images", "reference target"]);
        assert!(!Path::new(&out).exists());
    }
    fs::remove_file(Path::new(&model).join("preprocessor_config.json")).expect("removed");
    refuse(run("w1", &image), 4, &["preprocessor_config.json"]);
}

#[test]
fn an_autoawq_folder_keeps_the_eye_as_it_was() {
    let dir = scratch();
    let (model, ids) = ready(&dir, "llava");
    let (reference, hf) = (path(&dir, "reference"), path(&dir, "hf"));
    for (target, out) in [("reference", &reference), ("hf-awq", &hf)] {
        let done = awqc(&["compile", &model, "--target", target, "--group", "8", "--calib-ids", &ids, "-o", out, "-q"]);
        assert_eq!(done.code, 0, "{}", done.err);
    }
    let bytes = fs::read(Path::new(&hf).join("model.safetensors")).expect("tensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let patches = file.tensor("vision_tower.vision_model.embeddings.patch_embedding.weight").expect("the patches");
    assert_eq!(patches.shape(), [32, 3, 4, 4]);
    let image = photo(&dir, "a.png");
    let prompt: Vec<i32> = [vec![5], vec![159; 9], vec![6, 7]].concat();
    assert_eq!(expected(&hf, std::slice::from_ref(&image), &prompt, 4), expected(&reference, &[image], &prompt, 4));
}

#[test]
fn a_model_in_parts_needs_all_of_them() {
    let dir = scratch();
    let (model, _) = ready(&dir, "vila");
    let open = || Model::open(Path::new(&model)).map(|_| ()).expect_err("it does not open").to_string();
    let config = Path::new(&model).join("llm/config.json");
    let text = fs::read_to_string(&config).expect("a config");
    fs::write(&config, text.replacen('{', "{\"fancy_attention\": true,", 1)).expect("written");
    let e = open();
    assert!(e.contains("`llm_cfg.fancy_attention` is true"), "{e}");
    fs::write(&config, text.replacen("\"llama\"", "\"qwen9\"", 1)).expect("written");
    let e = open();
    assert!(e.contains("llm_cfg.model_type must be llama"), "{e}");
    fs::write(&config, text).expect("written");
    fs::remove_dir_all(Path::new(&model).join("mm_projector")).expect("removed");
    let e = open();
    assert!(e.contains("mm_projector") && e.contains("is missing"), "{e}");
}

#[test]
fn images_of_another_size_than_the_model_takes_are_refused() {
    let dir = scratch();
    let (model, _) = ready(&dir, "llava");
    let file = Path::new(&model).join("preprocessor_config.json");
    let mut settings: Json = serde_json::from_slice(&fs::read(&file).expect("settings")).expect("JSON");
    settings["crop_size"] = json!(12);
    fs::write(&file, settings.to_string()).expect("written");
    let model = Model::open(Path::new(&model)).expect("a model");
    assert!(Preparation::of_model(&model).is_ok());
    let images = model.module.images().expect("images");
    let e = pixels(&model, &images, &[photo(&dir, "a.png").into()]).map(|_| ()).expect_err("another size");
    assert!(e.message.contains("12 times 12") && e.message.contains("14 times 14"), "{e}");
}

#[test]
fn more_or_fewer_images_than_the_text_has_places_for_are_refused() {
    let folder = golden("llava");
    let expected = Expected::read(Path::new(&folder));
    let model = Model::open(Path::new(&folder)).expect("a model");
    let mut session = session(&model).expect("a session");
    let ids = expected.ids().remove(0);
    session.see(expected.pixels(None).expect("images"), &mut |_, _| Ok(())).expect("it sees");
    let e = session.forward(&ids, Logits::Last).map(|_| ()).expect_err("two images").to_string();
    assert!(e.contains("9 image tokens (159)") && e.contains("2 images of 9 rows need 18"), "{e}");
}
