//! The golden models: tiny checkpoints of every family with the outputs of PyTorch.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use awqc::exec::{Eye, Host, Session};
use awqc::generate::session;
use awqc::ir::verify::verify;
use awqc::model::Model;
use awqc::passes::Tensor;
use safetensors::SafeTensors;

/// Every golden folder with outputs, sorted by name; below the current folder if the tests were carried elsewhere.
pub(crate) fn folders() -> Vec<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let root = if built.is_dir() { built } else { PathBuf::from("tests/golden") };
    let mut found: Vec<PathBuf> = fs::read_dir(root)
        .expect("the golden folder")
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.join("expected.safetensors").exists())
        .collect();
    found.sort();
    assert!(found.len() >= 14, "only {} goldens", found.len());
    found
}

/// The goldens whose weights are floats: those that passes can work on.
pub(crate) fn float_folders() -> Vec<PathBuf> {
    let quantized =
        |p: &PathBuf| fs::read_to_string(p.join("config.json")).expect("a config").contains("quantization_config");
    folders().into_iter().filter(|p| !quantized(p)).collect()
}

/// A golden's name.
pub(crate) fn name(folder: &Path) -> String {
    folder.file_name().expect("a name").to_string_lossy().into_owned()
}

/// What PyTorch computed.
pub(crate) struct Expected {
    /// f32 tensors by name, with their shapes.
    pub(crate) floats: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// Integer tensors by name, with their shapes.
    pub(crate) ints: BTreeMap<String, (Vec<usize>, Vec<i32>)>,
}

impl Expected {
    pub(crate) fn read(folder: &Path) -> Self {
        let bytes = fs::read(folder.join("expected.safetensors")).expect("expected.safetensors");
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let (mut floats, mut ints) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in file.tensors() {
            let shape = tensor.shape().to_vec();
            match tensor.dtype() {
                safetensors::Dtype::F32 => {
                    let data = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    floats.insert(name, (shape, data));
                }
                safetensors::Dtype::I64 => {
                    let data = tensor.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as i32).collect();
                    ints.insert(name, (shape, data));
                }
                other => panic!("{name} is {other:?}"),
            }
        }
        Self { floats, ints }
    }

    /// The input ids without those that stand for images: a text.
    pub(crate) fn text(&self) -> Vec<Vec<i32>> {
        let image = |id: i32| self.floats.contains_key("pixel_values") && id == 159;
        self.ids().into_iter().map(|ids| ids.into_iter().map(|id| if image(id) { 3 } else { id }).collect()).collect()
    }

    /// The images of all sequences, or of one, if the model takes any.
    pub(crate) fn pixels(&self, sequence: Option<usize>) -> Option<Tensor> {
        let (shape, data) = self.floats.get("pixel_values")?;
        let (mut shape, mut data) = (shape.clone(), data.clone());
        if let Some(at) = sequence {
            let each = data.len() / self.ids().len();
            data = data[at * each..(at + 1) * each].to_vec();
            shape[0] /= self.ids().len();
        }
        Some(Tensor { shape, data })
    }

    /// The input ids, one list a sequence.
    pub(crate) fn ids(&self) -> Vec<Vec<i32>> {
        let (shape, ids) = &self.ints["input_ids"];
        ids.chunks(shape[1]).map(<[i32]>::to_vec).collect()
    }
}

/// What a model's eye makes of the images of the first sequence, if it takes any.
pub(crate) fn seen(model: &Model, expected: &Expected) -> Option<Tensor> {
    let module = verify(&model.module).expect("a valid module");
    let eye = Eye::<Host>::open(module, model.source.as_ref(), Default::default()).expect("an eye")?;
    let seen = eye.see(expected.pixels(Some(0)).expect("images"), &mut |_, _| Ok(())).expect("it sees");
    Some(seen.to_tensor().expect("numbers"))
}

/// The reference executor before the first sequence, its images seen if the model takes any.
pub(crate) fn reference(model: &Model, expected: &Expected) -> Session {
    let mut session = session(model).expect("a session");
    if let Some(pixels) = expected.pixels(Some(0)) {
        session.see(pixels, &mut |_, _| Ok(())).expect("it sees");
    }
    session
}

/// The largest absolute difference.
pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // A NaN must fail the comparison that follows.
    let worst = |w: f32, (a, b): (&f32, &f32)| if (a - b).abs() <= w { w } else { (a - b).abs() };
    a.iter().zip(b).fold(0.0, worst)
}
