//! `awqc bench kernels`: single products, on the processor or on a device.

use awqc_cpu::{Activations, CpuError, Isa};
use awqc_cuda::probe::Repeats;
use awqc_ir::{Group, Quant};
use serde_json::json;

use super::bench::{Output, table};
use super::{Context, print_json};
use crate::bandwidth::bandwidth;
use crate::bench::{SHAPES, kernel};
use crate::engine::{EngineArgs, Where};
use crate::failure::{Exit, Failure};
use crate::order::orders;
use crate::products::{Wanted, products};
use crate::progress::{print, say};

/// Weights that share a scale.
const GROUP: u32 = 128;
/// The most weights of a product.
const LARGEST: usize = 1 << 31;

/// What `awqc bench kernels` measures.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Options of `bench kernels`")]
pub(super) struct KernelArgs {
    /// Rows (output channels) and columns (input channels) of the weights; the linears of a 7B model if not given.
    #[arg(long, value_name = "ROWSxCOLS", value_delimiter = ',', value_parser = shape)]
    shapes: Vec<(usize, usize)>,
    /// Numbers of tokens that are multiplied at once.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = tokens)]
    tokens: Vec<usize>,
    /// Bits of the weights; 4 if not given, and with --device cuda 4, 3 and 2.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = bits)]
    bits: Vec<u8>,
    /// Products in a row on a device, for tests on slow ones.
    #[arg(long, hide = true)]
    repeats: Option<usize>,
}

impl KernelArgs {
    /// An error if something is asked for that a model does not have.
    pub(super) fn refuse(&self) -> Result<(), Failure> {
        let given = [
            ("--shapes", !self.shapes.is_empty()),
            ("--tokens", !self.tokens.is_empty()),
            ("--bits", !self.bits.is_empty()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Failure::new(Exit::Usage, format!("{flag} is for `awqc bench kernels`"))),
            None => Ok(()),
        }
    }

    fn wanted(&self, tokens: &[usize], bits: &[u8]) -> Wanted {
        let or = |given: &[usize], otherwise: &[usize]| if given.is_empty() { otherwise } else { given }.to_vec();
        let bits = if self.bits.is_empty() { bits } else { &self.bits };
        let quant = |bits: &u8| Quant { bits: *bits, symmetric: false, group: Group::Size(GROUP) };
        Wanted {
            quants: bits.iter().map(quant).collect(),
            shapes: if self.shapes.is_empty() { SHAPES.to_vec() } else { self.shapes.clone() },
            tokens: or(&self.tokens, tokens),
            repeats: self.repeats.map_or_else(Repeats::default, |products| Repeats { products, samples: 2 }),
        }
    }
}

fn shape(text: &str) -> Result<(usize, usize), String> {
    let (rows, cols) = text.split_once('x').ok_or_else(|| format!("`{text}`: ROWSxCOLS is needed"))?;
    match (rows.parse::<usize>(), cols.parse::<usize>()) {
        (Ok(rows), Ok(cols)) if rows > 0 && cols > 0 && rows.checked_mul(cols).is_some_and(|n| n <= LARGEST) => {
            Ok((rows, cols))
        }
        (Ok(_), Ok(_)) => Err(format!("`{text}`: between 1 and {LARGEST} weights are needed")),
        (_, _) => Err(format!("`{text}`: two numbers are needed")),
    }
}

fn tokens(text: &str) -> Result<usize, String> {
    let n = text.parse::<usize>().ok().filter(|n| (1..=4096).contains(n));
    n.ok_or_else(|| format!("`{text}`: a number from 1 to 4096 is needed"))
}

fn bits(text: &str) -> Result<u8, String> {
    let n = text.parse::<u8>().ok().filter(|n| Quant::BITS.contains(n));
    n.ok_or_else(|| format!("`{text}`: 2, 3, 4 or 8 is needed"))
}

pub(super) fn run(context: &Context, args: &KernelArgs, engine: &EngineArgs, output: Output) -> Result<(), Failure> {
    match engine.device {
        Some(Where::Cuda) => device(context, &args.wanted(&[1, 2, 4, 8, 16, 32, 512], &[4, 3, 2]), output),
        Some(Where::Host) | None => processor(context, &args.wanted(&[1, 8, 32, 512], &[4]), engine, output),
    }
}

/// Over the instruction sets that the machine has.
fn processor(context: &Context, wanted: &Wanted, engine: &EngineArgs, output: Output) -> Result<(), Failure> {
    let isas: Vec<Isa> = match engine.isa {
        Some(isa) if !isa.is_available() => {
            return Err(CpuError::Feature(isa.name()).into());
        }
        Some(isa) if !engine.act.is_none_or(|act| act.works_with(isa)) => {
            return Err(CpuError::Bf16(isa.name()).into());
        }
        Some(isa) => vec![isa],
        None => {
            let fits = |isa: &Isa| *isa != Isa::Scalar && engine.act.is_none_or(|act| act.works_with(*isa));
            Isa::available().into_iter().filter(fits).collect()
        }
    };
    if isas.is_empty() {
        return Err(CpuError::Feature(Isa::Amx.name()).into());
    }
    let mut rows = Vec::new();
    for quant in &wanted.quants {
        for shape in &wanted.shapes {
            for tokens in &wanted.tokens {
                for isa in &isas {
                    context.interrupt.check()?;
                    let act = engine.act.unwrap_or(Activations::fastest(*isa));
                    rows.push(kernel(*shape, *tokens, *quant, *isa, act, context.threads)?);
                }
            }
        }
    }
    let limit = bandwidth(context.threads);
    // One header for all rows: what reads CSV wants one table.
    let orders = match output {
        Output::Csv => Vec::new(),
        Output::Md | Output::Json => orders(isas.last().copied().unwrap_or(Isa::Scalar)),
    };
    if output == Output::Json {
        return print_json(&json!({
            "threads": context.threads,
            "read_gigabytes_per_second": limit,
            "kernels": rows,
            "orders": orders,
        }));
    }
    say(&format!("{} threads; memory reads {limit:.1} GB/s", context.threads));
    let header = ["type", "rows", "cols", "tokens", "isa", "act", "µs", "GB/s", "GOP/s"];
    let cells = rows.iter().map(|k| {
        vec![
            k.quant.clone(),
            k.rows.to_string(),
            k.cols.to_string(),
            k.tokens.to_string(),
            k.isa.to_owned(),
            k.act.to_owned(),
            format!("{:.0}", k.microseconds),
            format!("{:.1}", k.gigabytes_per_second),
            format!("{:.0}", k.gigaops),
        ]
    });
    print(&table(output, &header, cells));
    if orders.is_empty() {
        return Ok(());
    }
    say("the order of 4-bit codes, one thread, weights in the cache");
    let header = ["layout", "order", "10⁹ weights/s", "gain"];
    let cells = orders
        .iter()
        .map(|o| vec![o.layout.clone(), o.order.to_owned(), format!("{:.1}", o.gigaweights), format!("{:.2}", o.gain)]);
    print(&table(output, &header, cells));
    Ok(())
}

/// On the device.
fn device(context: &Context, wanted: &Wanted, output: Output) -> Result<(), Failure> {
    let found = products(wanted, &context.interrupt)?;
    if output == Output::Json {
        return print_json(&found);
    }
    let copy = found.copy_gigabytes_per_second;
    say(&format!("{}; memory copies {copy:.0} GB/s, reads and writes together", found.device));
    let header = ["type", "rows", "cols", "tokens", "µs", "GB/s", "% of copy", "TFLOP/s", "error"];
    let cells = found.products.iter().map(|p| {
        vec![
            p.quant.clone(),
            p.rows.to_string(),
            p.cols.to_string(),
            p.tokens.to_string(),
            format!("{:.1}", p.microseconds),
            format!("{:.0}", p.gigabytes_per_second),
            format!("{:.0}", 100.0 * p.bandwidth_share),
            format!("{:.2}", p.teraops),
            format!("{:.1e}", p.error),
        ]
    });
    print(&table(output, &header, cells));
    Ok(())
}
