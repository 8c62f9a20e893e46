//! `awqc-ir`: the language of the compiler.
//!
//! A trained language model is a text of this language: front ends write it, passes rewrite it, back ends run it. This
//! page is its reference. The crate reads no files and computes with no tensors; it knows what a model *is*.
//!
//! ```
//! let module = awqc_ir::parse(r#"
//!     awqir 1
//!     model "tiny" {dtype=f16, hidden=8}
//!     dim B, S
//!
//!     region @embed (%ids: i32[B,S], %pos: i32[S]) {
//!       $e = "embed.weight" : f16[100,8]
//!       %x = embedding %ids, $e
//!       return %x
//!     }
//!
//!     layer @0..1 (%x: f16[B,S,8]) from "layers.{i}" {
//!       $n = "norm.weight" : f16[8]
//!       $u = "up.weight"   : f16[24,8]
//!       $d = "down.weight" : f16[8,24]
//!       %h = rms_norm %x, $n {eps=1e-5}
//!       %u = linear %h, $u
//!       %s = silu %u
//!       %d = linear %s, $d
//!       %y = add %x, %d
//!       return %y
//!     }
//!
//!     region @head (%x: f16[B,S,8]) {
//!       $e = "embed.weight" : f16[100,8]
//!       %logits = linear %x, $e
//!       return %logits
//!     }
//! "#)?;
//! let module = awqc_ir::verify(&module)?;
//! assert_eq!(module.layers(), 2);
//! assert_eq!(module.regions[2].tensor_name("up.weight"), "layers.1.up.weight");
//! # Ok::<(), awqc_ir::Diagnostics>(())
//! ```
//!
//! # Modules, regions and the stream
//!
//! A [`Module`] is a chain of [`Region`]s. Each is a straight line of nodes without branches and loops, isolated from
//! the others: what comes in are its parameters, what goes out are its results, and its weights and data are its own.
//! A region can therefore be read, verified, rewritten and run with nothing else at hand, and one layer at a time in
//! memory.
//!
//! The regions run in order over the *stream*, a list of values. At the start it holds the token ids `i32[B,S]` and
//! their positions `i32[S]`. A region's parameters are the first values of the stream; its results replace the first
//! values of the stream, or make it longer. So `@embed` may compute rotary angles once, and every layer takes them as
//! its second and third parameter. The first result of the last region is the logits.
//!
//! A model that takes images begins with regions that see pixels, `[N,C,H,W]`, and nothing else. Then pixels stand at
//! the start of the stream, before ids and positions. See [`images`].
//!
//! Layers, `layer @0` and so on, are the repeated blocks that quantization works on. Other regions have a name:
//! `region @embed`; blocks among them end in a number, `region @vision.0`. A region's *prefix* (`from "layers.3"`) is
//! prepended, with a dot, to the tensor names in it.
//!
//! # Storage
//!
//! A region owns its nodes, values, weights and data in arenas with ids of their own types ([`NodeId`], [`ValueId`],
//! [`WeightId`], [`DataId`]). An id is never used twice. The nodes stand in program order, which is always
//! topological: a value is defined before it is used. Operands are ordered. Removed nodes leave holes until
//! [`Region::compact`] renumbers what is left.
//!
//! # Types
//!
//! `f16[B,S,4096]` is an element type and a shape. Elements are `f32`, `f16`, `bf16`, `i32`, or quantized: `u4g128` is
//! asymmetric with 4 bits and a scale for every 128 elements of a row, `i4g128` is symmetric, `u8row` has one scale for
//! a row (see [`Quant`]). Widths are 2, 3, 4 and 8. A dimension is a number or a symbol such as `B` and `S`, which a
//! `dim` line declares. Only weights are quantized. Once `pack` has chosen how a quantized weight lies in memory, its
//! type says so: `u4g128@rows[4096,4096]` ([`Layout`]). Nothing before that speaks of layouts.
//!
//! There is no quantized twin of any op: `linear %x, $w` with `$w : u4g128[…]` *is* the quantized product.
//!
//! # Ops
//!
//! An op takes operands and attributes and gives results, whose types follow ([`Op::infer`]). Values have their
//! channels last. Each op obeys a *scale law*: how a positive factor on a channel of one operand carries over to the
//! others ([`op::law`]). σ stands for the logarithm of the factor; scale fusion is solving these equations.
//!
//! | op | attributes | result | law |
//! |---|---|---|---|
//! | `embedding i, T` | `offset` | rows `i + offset` of `T` | σ(columns of T) = σ(y) |
//! | `linear x, W [, b]` | | `x Wᵀ + b`, `W: [out,in]` | σ(columns of W) = −σ(x), σ(rows of W) = σ(b) = σ(y) |
//! | `rms_norm x [, g]` | `eps`, `offset`, `heads` | `x / √(mean x² + eps) · (g + offset)` | σ(x) = 0, σ(g) = σ(y) |
//! | `layer_norm x [, g [, b]]` | `eps`, `heads` | `(x − mean) / √(var + eps) · g + b` | σ(x) = 0, σ(g) = σ(b) = σ(y) |
//! | `rope_table pos` | `dim`, `theta`, `scaling` | `cos`, `sin` of the angles, `f32[S,dim/2]` | 0 |
//! | `rope x, cos, sin` | `heads`, `interleaved` | each head's channels turned in pairs | σ(x) = σ(y) = 0 |
//! | `sdpa q, k, v` | `causal`, `heads`, `kv_heads`, `scale`, `window`, `softcap`, `alibi` | attention | σ(q) = σ(k) = 0, σ(y) follows the head of v |
//! | `silu x`, `sigmoid x`, `gelu x {form}`, `softcap x {at}`, `clamp x {at}` | | element by element | σ(x) = σ(y) = 0 |
//! | `relu x`, `scale x {by}` | | element by element | σ(y) = σ(x) |
//! | `add a, b` | | sum; `b` may lack leading axes | σ(a) = σ(b) = σ(y) |
//! | `mul a, b` | | product | σ(y) = σ(a) + σ(b) |
//! | `split x`, `concat a, b, …` | `sizes`, `heads` | channels, or those of each head, cut and joined | channels correspond |
//! | `repeat x` | `times` | the channels over and over | channels correspond |
//! | `softmax x` | | shares over the channels | σ(x) = σ(y) = 0 |
//! | `top_k p [, b]` | `k`, `groups`, `normalize`, `scale`, `near` | the largest scores, and whose they are | 0 |
//! | `dispatch x, i` | `experts` | `[E,B,S,C]`: for each expert the rows of its tokens | channels correspond |
//! | `combine y, w, i` | | the experts' rows, weighted and added up | channels correspond, σ(w) = 0 |
//! | `patches p` | `size` | squares of pixels `[N,C,H,W]` as rows `[N,P,C·size²]` | 0 |
//! | `merge x` | `side`, `by` | the rows of a square grid, those of each square joined | channels correspond |
//! | `learned x, W` | | the rows of `W` for each sequence of `x` | σ(columns of W) = σ(y) |
//! | `append a, b`, `cut x` | `start`, `len` | rows after rows, some of the rows | σ(a) = σ(b) = σ(y) |
//! | `place x, i, f` | `token` | `x` with the rows of `f` where `i` is `token` | σ(x) = σ(f) = σ(y) |
//! | `count i` | `token` | how often `token` came up to each position | |
//! | `cross_sdpa q, k, v, i` | `heads`, `kv_heads`, `scale` | attention to the piece of a memory that `i` says | as `sdpa` |
//! | `gate x, g` | | `x · tanh g` | σ(y) = σ(x) |
//! | `foreign x, …` | `op`, `results`, any others | an op of another system; rewrites must replace it | 0 |
//! | `fused @name(…)` | | what the body of `@name` gives | 0; see the inlined graph |
//!
//! Between `dispatch` and `combine` a value holds rows for each of the layer's experts, and `linear` has a stack of
//! matrices, `[E,out,in]`: see [`op::routing`]. Its channels are scaled expert by expert.
//!
//! `fused` is the one open op. A module defines `@name` once, and the body *is* the meaning of every call:
//!
//! ```
//! let module = awqc_ir::parse(r#"
//!     awqir 1
//!     fused @swiglu (%gu: f16[B,S,48]) {
//!       %g, %u = split %gu {sizes=[24,24]}
//!       %s = silu %g
//!       %m = mul %s, %u
//!       return %m
//!     }
//!     layer @0 (%gu: f16[B,S,48]) {
//!       %m = fused @swiglu(%gu)
//!       return %m
//!     }
//! "#)?;
//! let mut inlined = module.regions[0].clone();
//! awqc_ir::inline_fused(&mut inlined, &module.fused).expect("the definition is there");
//! assert_eq!(inlined.order().len(), 3);
//! # Ok::<(), awqc_ir::Diagnostics>(())
//! ```
//!
//! A back end that has a kernel of this name may use it; any other runs the body. Definitions have fixed shapes: an
//! instance for other shapes is a definition of its own, `@swiglu.1`, which goes by the same kernel name. A body calls
//! only what is defined before it. A call has no attributes, its weights are parameters of the body.
//!
//! # Weights
//!
//! A weight is a lazy expression over the tensors of the checkpoint ([`WeightExpr`]). Passes rewrite the expression;
//! numbers are touched when an artefact is written, one tensor at a time. Where a weight came from can be read off:
//!
//! ```
//! let text = r#"awqir 1
//! model "m" {dtype=f16}
//! dim B, S
//!
//! layer @0 (%x: f16[B,S,64]) from "layers.0" {
//!   #s0 = data "attn_in"                : f32[64]
//!   $q  = quant(mul.1("q.weight", #s0)) : u4g32[48,64]
//!
//!   %q = linear %x, $q : f16[B,S,48]
//!   return %q
//! }
//! "#;
//! assert_eq!(awqc_ir::print(&awqc_ir::parse(text)?), text);
//! # Ok::<(), awqc_ir::Diagnostics>(())
//! ```
//!
//! | term | meaning |
//! |---|---|
//! | `"name"` | a float tensor of the checkpoint; the prefix comes before it |
//! | `packed.LAYOUT("stem")` | a quantized tensor as stored |
//! | `mul.AXIS(w, #s)`, `div.AXIS(w, #s)` | each channel of an axis times, or divided by, its entry of `#s` |
//! | `offset(w, c)` | `w + c` |
//! | `cat.AXIS(a, b, …)`, `rows(w, start, len)`, `transpose(w)` | joined, cut out, turned |
//! | `stack(a, b, …)`, `stack(e in 0..8, "experts.{e}.weight")` | equal terms along a new first axis; a term for each number |
//! | `clip(w, #lo, #hi, g128)` | each group limited to bounds of its own; `row` for whole rows |
//! | `quant(w)`, `pack(w)` | rounded to codes, and these in the layout of the type |
//! | `codes(w, #q, #s, #z)` | the codes that a pass chose for `w`, their scales and zero points; `w` itself is not read |
//!
//! Factors are `#s`, `tie(#s, WIDTH, TIMES)` (each run of WIDTH entries serves TIMES runs of channels) or
//! `within(#s, START, TOTAL)` (all channels but these have 1). For a stack of matrices they may be the factors of each
//! matrix, one run after the other. Float terms are computed in f32 and rounded once, to the
//! element type of the outermost float term. Numbers that a pass made are data entries, `#s0 = data "label" : f32[64]`;
//! the text has their shape, a sidecar has the numbers.
//!
//! A term stands inside the term that uses it if its type follows: the factors, offsets, bounds, roundings and packings
//! above a term keep its shape, `transpose` turns it; the element type is that of the term above, or the module's
//! `dtype` below `quant` and `codes`. Otherwise it has a line of its own. The printer knows when.
//!
//! # Names are comments
//!
//! Names of values, weights and data are for people. Nothing reads them: [`view::isomorphic`] compares regions without
//! them, and printing makes them legal and different where they are not.
//!
//! # Text
//!
//! Four sigils tell names apart: `%` value, `$` weight, `#` data, `@` symbol. White space separates words, `//` starts
//! a comment.
//!
//! ```text
//! module  := "awqir" "1" { model | dim | let | require | fused | region | layer }
//! model   := "model" string ["{" attrs "}"]              dtype=f16 says what `T` is; all else is for people
//! dim     := "dim" (word {"," word} | "none")
//! fused   := "fused" @name params body
//! region  := "region" @name [".." expr] params {from | when} body
//! layer   := "layer" @first [".." expr] params {from | when} body
//! params  := "(" [operand ":" type {"," operand ":" type}] ")"
//! from    := "from" string                               `{i}` is the number of the layer
//! when    := "when" expr                                 the region is there only if it holds
//! body    := "{" {let | require | node | alias | weight | data} "return" values "}"
//! node    := ["opt"] values "=" (op operands | "fused" @name "(" [operands] ")") ["{" attrs "}"] [":" types]
//! op      := word | "(" expr ")"                         the value is a string such as "gelu {form=tanh}"
//! alias   := %name "=" target [":" type]
//! target  := %name | "if" expr "then" target "else" target
//! weight  := $name "=" term [":" type]                   terms as above; a tensor is string {"or" string} ["?"]
//! data    := #name "=" "data" string ":" type
//! type    := elem ["@" layout] "[" [dim {"," dim}] "]"   elem `T` is the model's dtype; a dim is a symbol or expr
//! attrs   := key ["=" expr] {"," key ["=" expr]}         a key alone is true
//! let     := "let" word "=" expr {"," word "=" expr}
//! require := "require" expr "," string                   if it does not hold, the string is the error
//! ```
//!
//! Types after a node are optional when reading and checked if they are there; writing always has them. An attribute
//! that comes out as `none`, or a flag that comes out as `false`, is left out. Enum variants are words, `form=tanh`, or
//! have fields, `scaling=bands(factor=8.0, low=1.0)`. Printing aligns columns, writes floats as the shortest text that
//! reads back the same, and writes neighbouring layers that differ in nothing but their number once, as a range.
//! Reading what was printed gives the same meaning, and printing that gives the same text.
//!
//! # Templates
//!
//! A model family is a text with expressions in it, read against a configuration and a list of tensors ([`Env`]):
//!
//! ```
//! use serde_json::{Value, json};
//!
//! struct Checkpoint(Value);
//!
//! impl awqc_ir::Env for Checkpoint {
//!     fn lookup(&self, path: &str) -> Option<Value> {
//!         path.strip_prefix("config.").and_then(|key| self.0.get(key).cloned())
//!     }
//!     fn tensor(&self, name: &str) -> bool {
//!         !name.ends_with(".bias")
//!     }
//! }
//!
//! let template = r#"awqir 1
//!     let hidden = config.hidden_size, heads = config.heads
//!     let hd = config.head_dim ?? hidden / heads
//!     layer @0..config.layers-1 (%x: T[B,S,hidden]) from "h.{i}" {
//!       $w = "fc.weight"  : T[heads*hd, hidden]
//!       $b = "fc.bias"?   : T[heads*hd]
//!       %h = linear %x, $w, $b
//!       %y = (config.act) %h
//!       return %y
//!     }"#;
//! let model = Checkpoint(json!({"hidden_size": 64, "heads": 4, "layers": 3, "act": "gelu {form=tanh}"}));
//! let module = awqc_ir::parse_with(template, &model)?;
//! let (_, linear) = module.regions[2].nodes().next().expect("a layer has nodes");
//! assert_eq!(linear.operands.len(), 2); // the checkpoint has no bias
//! # Ok::<(), awqc_ir::Diagnostics>(())
//! ```
//!
//! Expressions are numbers, strings, `true`, `false`, `none`, lists, dotted names, `+ - * / %`, comparisons,
//! `and or not`, `a ?? b` (`b` if `a` is `none`), `if c then a else b`, `list[i]`, and the functions
//! `sqrt ln int floor float len contains min max`. Integers stay integers, and their division must leave no remainder.
//! `i` is the number of the layer. A path into
//! `config` that leads nowhere is `none`; any other name that is not known is an error. `{name}` in a string is the
//! value of the name; a brace before anything else than a name, or written `\{`, is a brace.
//!
//! `"a" or "b"` is the first of these tensors that the checkpoint has. `"a"?` may be missing: a missing weight at the
//! end of the operands is dropped where the op allows it, and a line that starts with `opt` comes down to another name
//! for its first operand. Nodes that a compile-time `if` passes over are not made.

pub mod diag;
pub mod id;
pub mod images;
pub mod inline;
pub mod module;
pub mod op;
pub mod panels;
pub mod region;
pub mod streams;
pub mod tensor;
pub mod text;
pub mod tiles;
pub mod ty;
pub mod verify;
pub mod view;
pub mod weight;

pub use diag::{Diagnostic, Diagnostics, Place, Show, Span};
pub use id::{DataId, NodeId, ValueId, WeightId};
pub use images::Images;
pub use inline::{InlineError, OutlineError, inline_fused, outline};
pub use module::{FusedDef, Module};
pub use op::{Op, OpError, OpInfo, Operand};
pub use region::{Data, Def, Node, Region, RegionName, Uses, Value};
pub use tensor::{RawTensor, Stored, TensorError, TensorInfo, TensorSource};
pub use text::{Env, NoEnv, parse, parse_with, print, print_region};
pub use ty::{Dim, Elem, Group, Layout, Name, Quant, Type};
pub use verify::{Stage, Verified, verify, verify_stage};
pub use weight::{DataMap, DataRef, Weight, WeightExpr};
