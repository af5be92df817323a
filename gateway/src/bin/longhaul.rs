//! The operator's program. Everything is in `longhaul_gateway::operator`.

use std::process::ExitCode;

fn main() -> ExitCode {
    longhaul_gateway::operator::main()
}
