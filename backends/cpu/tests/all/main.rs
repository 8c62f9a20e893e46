//! Every instruction set of the machine against the scalar specification, and whole programs against the executor.

mod attention;
mod placement;
mod products;
mod support;
