//! Scale laws: how an op ties the per-channel scales of what it touches.
//!
//! Give every channel of every value, and every channel of every weight axis, an unknown positive factor by which it
//! is multiplied; σ is its logarithm. An op computes the same function, up to the factors of its results, exactly when
//! its law holds. The scales that no law forces to 1 are the graph's *scale freedom*; `awqc-passes` solves for it.

/// A value that an op touches: its channels are those of the last axis. A value of several experts has channels of its
/// own for each of them; where the other side of an equation has one set, it goes for all experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// The operand at this position.
    Operand(usize),
    /// The result at this position.
    Result(usize),
}

/// Which channel of the right side belongs to channel `c` of the left side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelMap {
    /// `c`.
    Identity,
    /// `c + k`.
    Shift(u64),
    /// `c mod k`: one parameter for every head.
    Modulo(u64),
    /// `(c / width) * stride + start + c mod width`: runs of `width` channels cut out of runs of `stride`.
    Strided {
        /// Channels of a run on the left.
        width: u64,
        /// Channels of a run on the right.
        stride: u64,
        /// The first channel within a run on the right.
        start: u64,
    },
    /// `(c / width / times) * width + c mod width`: query heads that share a key/value head.
    Grouped {
        /// Channels a head.
        width: u64,
        /// Query heads a key/value head.
        times: u64,
    },
}

impl ChannelMap {
    /// The right side's channel.
    pub fn apply(self, c: u64) -> u64 {
        match self {
            ChannelMap::Identity => c,
            ChannelMap::Shift(k) => c + k,
            ChannelMap::Modulo(k) => c % k.max(1),
            ChannelMap::Strided { width, stride, start } => (c / width.max(1)) * stride + start + c % width.max(1),
            ChannelMap::Grouped { width, times } => (c / width.max(1) / times.max(1)) * width + c % width.max(1),
        }
    }
}

/// Whether a parameter's scale follows or undoes a value's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sense {
    /// σ(parameter) = σ(value): the parameter produces the scale.
    Along,
    /// σ(parameter) = −σ(value): the parameter undoes the scale.
    Against,
}

/// One equation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Law {
    /// σ = 0 for every channel.
    Pin(Port),
    /// σ(left, c) = σ(right, map(c)) for every channel of the left side.
    Tie {
        /// The side whose channels are counted.
        left: Port,
        /// The other side.
        right: Port,
        /// The correspondence.
        map: ChannelMap,
    },
    /// σ(product) = σ(a) + σ(b), channel by channel.
    Product {
        /// The product.
        product: Port,
        /// A factor.
        a: Port,
        /// The other factor.
        b: Port,
    },
    /// A parameter's axis carries the scale of a value: σ(parameter, map(c)) = ±σ(value, c).
    ///
    /// With an `offset`, the parameter acts as `w + offset`, so scaling it by `k` means `(w + offset)·k − offset`.
    Parameter {
        /// The weight operand's position.
        operand: usize,
        /// Its axis.
        axis: usize,
        /// The value.
        value: Port,
        /// Follows or undoes.
        sense: Sense,
        /// Value channel to parameter channel.
        map: ChannelMap,
        /// The constant that the op adds to the parameter.
        offset: f64,
    },
}

impl Law {
    /// Channels tied one to one.
    pub fn same(left: Port, right: Port) -> Self {
        Law::Tie { left, right, map: ChannelMap::Identity }
    }

    /// A parameter axis that corresponds one to one.
    pub fn parameter(operand: usize, axis: usize, value: Port, sense: Sense) -> Self {
        Law::Parameter { operand, axis, value, sense, map: ChannelMap::Identity, offset: 0.0 }
    }
}
