# Short names for what a person does often; CONTRIBUTING.md lists every check and how to run it.

.DEFAULT_GOAL := help

# The disk of the demonstration: small (1 GiB), or standard (4 GiB, the standard run's).
KIND ?= small
RATE ?= 100mbit
RTT ?= 80ms
# Where `make install` puts things; DESTDIR for packagers.
PREFIX ?= /usr/local
DESTDIR ?=
# What was built is run as it is: cargo would build it anew for another choice of packages.
RELEASE := $(or $(CARGO_TARGET_DIR),target)/release

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## Move a running Linux VM over an emulated WAN, and let it prove itself there
	@.ci/bootstrap demo
	@cargo build --release --locked --bins -p longhaul-agent -p longhaul-gateway -p longhaul-lab
	@LONGHAUL_BIN=$(RELEASE) $(RELEASE)/lab demo --kind $(KIND) --rate $(RATE) --rtt $(RTT)

.PHONY: demo-cold
demo-cold: ## Move a Linux VM's disk over an emulated WAN, prove it equal, boot it
	@.ci/bootstrap demo
	@cargo build --release --locked --bins -p longhaul-agent -p longhaul-gateway -p longhaul-lab
	@LONGHAUL_BIN=$(RELEASE) $(RELEASE)/lab demo --cold --kind $(KIND) --rate $(RATE) --rtt $(RTT)

.PHONY: test
test: ## Run every test
	@.ci/bootstrap test
	@.ci/test

.PHONY: test-qemu
test-qemu: ## Run the tests of running VMs with the QEMU of Debian's backports, or QEMU=PROGRAM
	@.ci/bootstrap test
	@.ci/other-qemu

.PHONY: lint
lint: ## Check format, lints, structure, licences and bans
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --locked -- -D warnings
	@cargo test --quiet --locked -p longhaul-lab --test tidy
	@if cargo deny --version > /dev/null 2>&1; then cargo deny --offline check bans licenses sources; fi

.PHONY: ci
ci: ## Run all that is run before a merge
	@.ci/run

.PHONY: build
build: ## Build the three programs for use
	@cargo build --release --locked --bins -p longhaul-agent -p longhaul-gateway

.PHONY: install
install: ## Install programs, units and examples, after `make build` (PREFIX, DESTDIR)
	@test -x target/release/longhaul-agent || { echo "nothing is built yet: run make build first, as the user who has cargo" >&2; exit 1; }
	install -D -t $(DESTDIR)$(PREFIX)/bin target/release/longhaul target/release/longhaul-agent target/release/longhaul-gateway
	install -D -m 0644 -t $(DESTDIR)/etc/systemd/system configs/systemd/longhaul-agent.service configs/systemd/longhaul-gateway.service
	sed -i 's#/usr/local/\(bin\|share\)/#$(PREFIX)/\1/#' $(DESTDIR)/etc/systemd/system/longhaul-*.service
	install -D -m 0644 configs/systemd/sysusers.conf $(DESTDIR)/usr/lib/sysusers.d/longhaul.conf
	install -D -m 0644 configs/sysctl.conf $(DESTDIR)/etc/sysctl.d/60-longhaul.conf
	install -d -m 0755 $(DESTDIR)/etc/longhaul
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/doc/longhaul README.md
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/doc/longhaul/configs configs/README.md configs/*.toml
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/doc/longhaul/configs/two-sites configs/two-sites/*

# Random cases of each property and damage test; seconds for each fuzz target.
CASES ?= 2000
TIME ?= 60

.PHONY: fuzz
fuzz: ## Throw damage at every parser and decoder for longer (CASES, TIME)
	@.ci/bootstrap test
	@.ci/fuzz $(CASES) $(TIME)

.PHONY: bench
bench: ## Measure the parts, for benches/RESULTS.md
	@.ci/bootstrap bench
	@.ci/bench

# The side-by-side benchmark. What is in benches/results/runs.jsonl is not run again: after a stop it goes on. All of it takes
# many hours. Lists are separated by commas; without a list it is all.
PROFILES ?=
WORKLOADS ?=
CONTESTANTS ?=

.PHONY: bench-wan
bench-wan: ## Longhaul beside QEMU alone and others (PROFILES, WORKLOADS, CONTESTANTS, RUNS)
	@.ci/bootstrap bench
	@.ci/bench-wan "$(PROFILES)" "$(WORKLOADS)" "$(CONTESTANTS)" $(or $(RUNS),3)

# Runs (10 by default) with faults drawn at random: programs killed, the link cut. The same SEED draws the same faults.
# A campaign that was stopped goes on at run FIRST. WHICH is cold, live, full (running guests of the full size) or all.
SEED ?= 1
FIRST ?= 1
WHICH ?= all

.PHONY: campaign
campaign: ## Kill programs and cut the link at random moments, many times (RUNS, SEED, FIRST, WHICH)
	@.ci/bootstrap demo
	@.ci/campaign $(or $(RUNS),10) $(SEED) $(FIRST) $(WHICH)
