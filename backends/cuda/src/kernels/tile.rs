//! Tiles of packed weights in registers: what the decode and the prefill product share. See [`awqc_ir::tiles`].

use awqc_ir::tiles::{LANES, STEP, TILE_COLS, TILE_ROWS, Tiles};
use cubecl::prelude::*;
use half::f16;

use super::routed::Routed;
use crate::emit::Args;

/// Two f16 numbers, or two codes as such.
pub(crate) type Pair = Vector<f16, Const<2>>;
/// Two columns of a sum: two tokens.
pub(crate) type Sums = Vector<f32, Const<2>>;

/// The sizes of a packed weight as kernels use them, in units of 32-bit words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Spec {
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    pub(crate) bits: u32,
    pub(crate) symmetric: bool,
    pub(crate) group: u32,
    pub(crate) groups: u32,
    pub(crate) panels: u32,
    pub(crate) tiles: u32,
    /// Words of a panel's header.
    pub(crate) header: u32,
    /// Words of a panel.
    pub(crate) panel: u32,
    /// Words of a tile.
    pub(crate) tile: u32,
    /// Words of one load of codes: 4, or 2 for narrow codes.
    pub(crate) load: u32,
    /// Steps of the product that share a scale: all four of a tile, two, or one.
    pub(crate) run: u32,
    /// How rows find their experts, if there are any: `rows` are those of one expert then, `panels` those of all.
    pub(crate) routed: Option<Routed>,
}

/// The arguments of a packed product, see [`super::gemv::source`].
pub(crate) struct Operands<N: Size> {
    pub(crate) words: NativeExpand<Array<u32>>,
    pub(crate) codes: NativeExpand<Array<Vector<u32, N>>>,
    pub(crate) x: NativeExpand<Array<Vector<u32, Const<2>>>>,
    /// `y` in its place if there is none: it is not read then.
    pub(crate) bias: NativeExpand<Array<f32>>,
    pub(crate) y: NativeExpand<Array<f32>>,
    pub(crate) call: NativeExpand<Array<u32>>,
    /// `call` in its place if rows need not find experts: it is not read then.
    pub(crate) route: NativeExpand<Array<u32>>,
}

impl<N: Size> Operands<N> {
    pub(crate) fn of(args: &mut Args, has_bias: bool, routed: bool) -> Self {
        let words = args.input("weight");
        let codes = args.input("codes");
        let x = args.input("x");
        let bias = has_bias.then(|| args.input("bias"));
        let y = args.output("y");
        let call: NativeExpand<Array<u32>> = args.input("call");
        let route = if routed { args.input("route") } else { call.clone() };
        Self { words, codes, x, bias: bias.unwrap_or_else(|| y.clone()), y, call, route }
    }
}

impl Spec {
    pub(crate) fn of(t: &Tiles) -> Self {
        let run = match t.group() {
            g if t.groups() == 1 || g.is_multiple_of(TILE_COLS) => 4,
            g if g.is_multiple_of(2 * STEP) => 2,
            _ => 1,
        };
        Self {
            rows: t.rows() as u32,
            cols: t.cols() as u32,
            bits: t.bits(),
            symmetric: t.symmetric(),
            group: t.group() as u32,
            groups: t.groups() as u32,
            panels: t.panels() as u32,
            tiles: t.tiles() as u32,
            header: t.header_bytes() as u32 / 4,
            panel: t.panel_bytes() as u32 / 4,
            tile: t.tile_bytes() as u32 / 4,
            load: if t.bits() < 4 { 2 } else { 4 },
            run,
            routed: None,
        }
    }

    /// Of the matrices of experts, one below the other.
    pub(crate) fn stacked(t: &Tiles, routed: Routed) -> Self {
        let rows = t.rows() as u32 / routed.stack().experts.max(1);
        Self { rows, routed: Some(routed), ..Self::of(t) }
    }

    /// `u4g128_4096x4096`.
    pub(crate) fn label(&self) -> String {
        let sign = if self.symmetric { "i" } else { "u" };
        let group = if self.groups == 1 { "row".to_owned() } else { self.group.to_string() };
        let routed = self.routed.map(Routed::label).unwrap_or_default();
        format!("{sign}{}g{group}_{}x{}{routed}", self.bits, self.rows, self.cols)
    }

    /// Loads of codes of a lane for one tile.
    pub(crate) fn loads(&self) -> u32 {
        if self.bits == 8 { 2 } else { 1 }
    }
}

/// Rows of a panel, for kernels.
pub(crate) const ROWS: u32 = TILE_ROWS as u32;
/// Lanes of a warp, for kernels.
pub(crate) const WARP: u32 = LANES as u32;

/// Writes `sum` with its bias, if the token and the channel exist.
#[cube]
pub(crate) fn put(
    y: &mut Array<f32>,
    bias: &Array<f32>,
    token: u32,
    tokens: u32,
    channel: u32,
    sum: f32,
    #[comptime] has_bias: bool,
    #[comptime] spec: Spec,
) {
    if token < tokens && channel < comptime!(spec.rows) {
        let at = (token * comptime!(spec.rows) + channel) as usize;
        if comptime!(has_bias) {
            y[at] = sum + bias[channel as usize];
        } else {
            y[at] = sum;
        }
    }
}

/// The panel of a stack in which panel `own` of an expert begins. There may be none behind the last rows of the stack.
#[cube]
pub(crate) fn panel_of(expert: u32, own: u32, #[comptime] spec: Spec) -> u32 {
    expert * comptime!(spec.rows) / ROWS + own
}

/// The codes of this lane in tile `t` of a panel: `bits` words.
#[cube]
pub(crate) fn load_codes<N: Size>(
    words: &Array<u32>,
    codes: &Array<Vector<u32, N>>,
    panel: u32,
    t: u32,
    lane: u32,
    #[comptime] spec: Spec,
) -> Array<u32> {
    let mut out = Array::<u32>::new(comptime!(spec.bits as usize));
    let first = panel * comptime!(spec.panel) + comptime!(spec.header) + t * comptime!(spec.tile);
    let n = comptime!(spec.load);
    #[unroll]
    for half in 0..comptime!(spec.loads()) {
        let v = codes[(first / n + half * WARP + lane) as usize];
        #[unroll]
        for i in 0..n {
            out[comptime!((half * n + i) as usize)] = v[comptime!(i as usize)];
        }
    }
    if comptime!(spec.bits == 3) {
        out[2usize] = words[(first + comptime!(2 * WARP) + lane) as usize];
    }
    out
}

/// Pair `p` of a lane's codes as f16 numbers, plus 1024 each: codes go where an f16 of that size has its last bits.
#[cube]
pub(crate) fn pair(codes: &Array<u32>, #[comptime] p: u32, #[comptime] bits: u32) -> Pair {
    let magic = 0x6400_6400u32;
    let word = if comptime!(bits == 4) {
        (codes[comptime!((p / 4) as usize)] >> comptime!(4 * (p % 4))) & 0x000f_000fu32
    } else if comptime!(bits == 8) {
        (codes[comptime!((p / 2) as usize)] >> comptime!(8 * (p % 2))) & 0x00ff_00ffu32
    } else if comptime!(bits == 3) {
        let low = (codes[comptime!((p / 8) as usize)] >> comptime!(2 * (p % 8))) & 0x0003_0003u32;
        let top = (codes[2usize] >> p) & 0x0001_0001u32;
        low | (top << 2u32)
    } else {
        (codes[comptime!((p / 8) as usize)] >> comptime!(2 * (p % 8))) & 0x0003_0003u32
    };
    Pair::reinterpret(word | magic)
}

/// The scales and zero points of the two rows of a lane in one group.
#[derive(CubeType)]
pub(crate) struct Grid {
    /// Scale of row `g`.
    pub(crate) s0: f32,
    /// Scale of row `g + 8`.
    pub(crate) s1: f32,
    /// Zero point of row `g`, plus 1024, twice.
    pub(crate) z0: Pair,
    /// Zero point of row `g + 8`, plus 1024, twice.
    pub(crate) z1: Pair,
}

/// The scales and zero points of group `group` for the rows `row` and `row + 8` of a panel.
#[cube]
pub(crate) fn load_grid(words: &Array<u32>, panel: u32, group: u32, row: u32, #[comptime] spec: Spec) -> Grid {
    let base = panel * comptime!(spec.panel);
    let scales = Pair::reinterpret(words[(base + group * 8 + row) as usize]);
    let (z0, z1) = if comptime!(spec.symmetric) {
        let middle = Pair::from_int(comptime!(1024 + (1i64 << (spec.bits - 1))));
        (middle, middle)
    } else {
        let word = words[(base + comptime!(spec.groups * 8) + group * 4 + row / 2) as usize];
        let both = word >> ((row % 2) * 16);
        let low = both & 0xffu32;
        let high = (both >> 8u32) & 0xffu32;
        let magic = 0x6400_6400u32;
        (Pair::reinterpret(magic + low * 0x0001_0001u32), Pair::reinterpret(magic + high * 0x0001_0001u32))
    };
    Grid { s0: f32::cast_from(scales[0usize]), s1: f32::cast_from(scales[1usize]), z0, z1 }
}

/// The left operand of step `s` of a tile: codes minus zero points, exact in f16.
#[cube]
pub(crate) fn left(codes: &Array<u32>, grid: &Grid, #[comptime] s: u32, #[comptime] bits: u32) -> Array<Pair> {
    let mut a = Array::<Pair>::new(4usize);
    a[0usize] = pair(codes, comptime!(4 * s), bits) - grid.z0;
    a[1usize] = pair(codes, comptime!(4 * s + 1), bits) - grid.z1;
    a[2usize] = pair(codes, comptime!(4 * s + 2), bits) - grid.z0;
    a[3usize] = pair(codes, comptime!(4 * s + 3), bits) - grid.z1;
    a
}

/// The right operand of a step: four neighbouring f16 activations of one token, as two words.
#[cube]
pub(crate) fn right(x: Vector<u32, Const<2>>) -> Array<Pair> {
    let mut b = Array::<Pair>::new(2usize);
    b[0usize] = Pair::reinterpret(x[0usize]);
    b[1usize] = Pair::reinterpret(x[1usize]);
    b
}

/// Sums of 16 rows and 8 tokens, none yet.
#[cube]
pub(crate) fn zero() -> Array<Sums> {
    let mut c = Array::<Sums>::new(2usize);
    c[0usize] = Sums::new(0.0);
    c[1usize] = Sums::new(0.0);
    c
}

/// `sums += a b`, on tensor cores: f16 factors, f32 sums.
#[cube]
pub(crate) fn product(a: &Array<Pair>, b: &Array<Pair>, sums: &mut Array<Sums>) {
    let mma = cmma::MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    mma.execute_inplace(a, b, sums);
}

/// `total += scale · sums`, row by row.
#[cube]
pub(crate) fn flush(total: &mut Array<Sums>, sums: &Array<Sums>, grid: &Grid) {
    total[0usize] += sums[0usize] * Sums::new(grid.s0);
    total[1usize] += sums[1usize] * Sums::new(grid.s1);
}
