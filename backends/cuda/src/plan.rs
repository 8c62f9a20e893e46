//! The launch plan: what a device does for each call, as data. It is written beside the kernels (`kernels/plan.json`)
//! and needs neither the module nor the compiler to be carried out.

use awqc_ir::images::Placed;
use awqc_ir::op::RopeTable;
use serde::{Deserialize, Serialize};

/// Tokens up to which the kernels for decoding run.
pub const FEW: usize = 8;

/// A compiled module. Tokens of a prompt go through the body in pieces of `chunk`; the head makes logits of
/// `head_chunk` of them at a time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of this format.
    pub version: u32,
    /// The architecture: 89 is `sm_89`.
    pub arch: u32,
    /// Tokens of a pass through the body.
    pub chunk: usize,
    /// Tokens of a pass through the head.
    pub head_chunk: usize,
    /// Logits of a token.
    pub vocabulary: usize,
    /// Where the logits are.
    pub logits: usize,
    /// Bytes of activations.
    pub arena_bytes: usize,
    /// Bytes of weights that every token reads.
    pub bytes_per_token: usize,
    /// The kernels.
    pub kernels: Vec<Kernel>,
    /// Tensors that lie on the device.
    pub constants: Vec<Constant>,
    /// Bytes that a position takes in each KV cache.
    pub caches: Vec<usize>,
    /// Rotary angles that come with every call.
    pub angles: Vec<RopeTable>,
    /// Embedding tables and what is looked up in them, to be checked beforehand.
    pub tables: Vec<Table>,
    /// The images that the module takes, if it takes any.
    pub images: Option<Placed>,
    /// All regions but the last, and those of the module's eye, which are not in the plan.
    pub body: Part,
    /// The last region.
    pub head: Part,
    /// Finds the largest logit of a token.
    pub choice: Launch,
    /// Where it leaves the token's id.
    pub chosen: usize,
    /// Finds the largest logits of a token.
    pub top: Top,
}

/// Version of the format.
pub const VERSION: u32 = 3;

/// A kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Its name: that of its files and of its entry.
    pub name: String,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: usize,
    /// Arguments.
    pub args: usize,
}

/// A tensor of `weights.safetensors` that lies on the device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constant {
    /// Its name in the file.
    pub tensor: String,
    /// What becomes of its bytes.
    pub form: Form,
}

/// What becomes of the bytes of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// Nothing.
    Stored,
    /// They are widened to f32, and a number is added.
    F32 {
        /// The number.
        add: f32,
    },
}

/// Rows that ids or positions look up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// What is looked up.
    pub of: Ints,
    /// Rows of the table.
    pub rows: usize,
    /// Added to every index.
    pub offset: u32,
}

/// Integers that come with every call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ints {
    /// Token ids.
    Ids,
    /// Positions in the sequence.
    Positions,
}

/// The launches of a part of the module, for few tokens and for many.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Up to [`FEW`] tokens.
    pub few: Vec<Launch>,
    /// More.
    pub many: Vec<Launch>,
}

/// A launch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Index of the kernel.
    pub kernel: usize,
    /// Blocks.
    pub grid: [Extent; 3],
    /// Arguments.
    pub args: Vec<Place>,
}

/// How the largest logits of a token are found, in order: see [`crate::kernels::top`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Top {
    /// The launches.
    pub launches: Vec<Launch>,
    /// How many are found; fewer if the vocabulary has fewer.
    pub count: usize,
    /// Where their values are, f32 `[count]`, by offset in bytes; behind them their ids, u32 `[count]`.
    pub found: usize,
}

/// A number of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extent {
    /// Always so many.
    Fixed(u32),
    /// One for so many tokens.
    Tokens(u32),
    /// So many for each token.
    Rows(u32),
    /// One for each run of up to `tile` rows of one of `experts` experts, of which a token has `each`: the most that
    /// there can be.
    Runs {
        /// Experts of the layer.
        experts: u32,
        /// Experts of a token.
        each: u32,
        /// Rows of a run.
        tile: u32,
    },
}

/// What an argument points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// A constant, by index.
    Constant(usize),
    /// Activations, by offset in bytes.
    Arena(usize),
    /// What the body left for the head: offset, and bytes of a token.
    Stream(usize, usize),
    /// A KV cache, by index.
    Cache(usize),
    /// Rows of images, f32, as many as the text has; nothing reads them if it has none.
    Images,
    /// What comes with the call.
    Given(Given),
}

/// What comes with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Given {
    /// The array that describes the call, see [`crate::kernels::Call`].
    Call,
    /// Integers, one a token.
    Ints(Ints),
    /// Cosines of an entry of [`Plan::angles`], `[tokens, dim/2]` f32.
    Cos(usize),
    /// Sines.
    Sin(usize),
    /// The row of an image that stands at each token, or [`crate::kernels::rows::NO_IMAGE`].
    Places,
}

impl Extent {
    /// Blocks for so many tokens.
    pub fn blocks(self, tokens: usize) -> u32 {
        match self {
            Extent::Fixed(n) => n,
            Extent::Tokens(each) => tokens.div_ceil(each.max(1) as usize) as u32,
            Extent::Rows(each) => tokens.saturating_mul(each as usize) as u32,
            Extent::Runs { experts, each, tile } => {
                let (rows, tile) = (tokens.saturating_mul(each as usize), tile.max(1) as usize);
                // Each expert that has rows has one run that may not be full.
                let open = rows.min(experts as usize);
                (rows.saturating_add(open.saturating_mul(tile - 1)) / tile) as u32
            }
        }
    }
}

impl Plan {
    /// Everything that comes with a call, in the order in which it lies in memory, with the bytes of each when there is
    /// room for `tokens` tokens.
    pub fn given(&self, tokens: usize) -> Vec<(Given, usize)> {
        let mut out = vec![
            (Given::Call, 4 * crate::kernels::Call::WORDS),
            (Given::Ints(Ints::Ids), 4 * tokens),
            (Given::Ints(Ints::Positions), 4 * tokens),
        ];
        for (i, table) in self.angles.iter().enumerate() {
            let bytes = tokens * table.dim as usize / 2 * 4;
            out.extend([(Given::Cos(i), bytes), (Given::Sin(i), bytes)]);
        }
        out.extend(self.images.map(|_| (Given::Places, 4 * tokens)));
        out.iter_mut().for_each(|(_, bytes)| *bytes = bytes.next_multiple_of(16));
        out
    }

    /// Checks that indices point to something; a damaged plan must not be carried out.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!(
                "the plan has version {}, this program writes {VERSION}: compile the model again",
                self.version
            ));
        }
        let parts = [&self.body, &self.head].into_iter().flat_map(|p| p.few.iter().chain(&p.many));
        for launch in parts.chain([&self.choice]).chain(&self.top.launches) {
            let Some(kernel) = self.kernels.get(launch.kernel) else {
                return Err(format!("the plan launches kernel {}, it has {}", launch.kernel, self.kernels.len()));
            };
            if kernel.args != launch.args.len() {
                return Err(format!(
                    "kernel {} takes {} arguments, not {}",
                    kernel.name,
                    kernel.args,
                    launch.args.len()
                ));
            }
            let inside = |place: &Place| match place {
                Place::Constant(i) => *i < self.constants.len(),
                Place::Arena(at) | Place::Stream(at, _) => *at < self.arena_bytes,
                Place::Cache(i) => *i < self.caches.len(),
                Place::Given(Given::Cos(i) | Given::Sin(i)) => *i < self.angles.len(),
                Place::Given(Given::Call | Given::Ints(_)) => true,
                Place::Images | Place::Given(Given::Places) => self.images.is_some(),
            };
            if let Some(place) = launch.args.iter().find(|p| !inside(p)) {
                return Err(format!("kernel {} is given {place:?}, which the plan does not have", kernel.name));
            }
        }
        let end = self.top.count.checked_mul(8).and_then(|bytes| bytes.checked_add(self.top.found));
        if end.is_none_or(|end| end > self.arena_bytes) {
            return Err(format!("the plan leaves the {} largest logits outside its memory", self.top.count));
        }
        Ok(())
    }
}
