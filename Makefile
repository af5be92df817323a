# Short names for what a person does often; CONTRIBUTING.md lists every check and how to run it.

.DEFAULT_GOAL := demo

# The disk of the demonstration: small (1 GiB), or standard (4 GiB, the standard run's).
KIND ?= small

DEMO_PACKAGES := iproute2 e2fsprogs fdisk qemu-system-x86 qemu-utils debootstrap busybox-static ca-certificates

.PHONY: demo
demo: ## Move a Linux VM's disk over an emulated WAN, prove it equal, boot it
	@missing=$$(for package in $(DEMO_PACKAGES); do \
	    dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || echo $$package; done); \
	if [ -n "$$missing" ]; then \
	    echo "installing" $$missing; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing; fi
	@cargo build --release --bins -p longhaul-agent -p longhaul-gateway -p longhaul-lab
	@cargo lab demo --kind $(KIND) --rate 100mbit --rtt 80ms
