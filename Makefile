# What can be done with this checkout. `make` alone says it.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# A shell under sudo often knows neither /usr/local/go/bin nor, on Debian, the sbin directories of nginx and iptables.
export PATH := $(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unversioned)
FUZZTIME ?= 10s
SOAKTIME ?= 10m
N        ?= 20
SEED     ?= 1
PACKAGES ?= ./internal/...

# The largest share, in percent, of comment lines and of document lines that may use a phrase which scripts/prose lists.
PROSE_COMMENTS  ?= 2
PROSE_DOCUMENTS ?= 2

# The largest binary that `make size` accepts, in bytes.
MAX_BINARY ?= 15650000

# Packages that carry no traffic. They are compiled without inlining, because their copies of small functions are 0.7 MB. The
# parser of handshakes and certificates is 0.1 MB of it.
COLD := ./agent ./cmd/... ./healthz ./iptables/... ./run \
	$(addprefix ./internal/,admin capture cel certview checklist commandline configdump configview controlplane datagram dns edge \
		export identity istiod jwks localaddr logring netns ownport podinfo preflight prestart probe promtext proxyconfig \
		sandbox scrape status terminal xds) \
	archive/tar compress/flate compress/gzip crypto/ecdsa crypto/ed25519 crypto/elliptic crypto/rsa crypto/x509 encoding/asn1 \
	encoding/hex encoding/json encoding/pem flag fmt html io/fs log log/slog math/big mime mime/multipart net net/http net/textproto \
	net/url os/exec os/signal path/filepath reflect regexp/syntax runtime/pprof text/... \
	github.com/coreos/... github.com/go-jose/go-jose/v4/... github.com/google/nftables/... github.com/mdlayher/... \
	github.com/spf13/... github.com/vishvananda/... vendor/golang.org/x/crypto/cryptobyte

BUILD    := CGO_ENABLED=0 $(GO) build -buildvcs=false -trimpath -ldflags "-s -w -X main.version=$(VERSION)" $(COLD:%=-gcflags=%=-l)
# Tests link in half of the time without debugging information. With -trimpath, what one checkout has compiled serves the others.
FAST     := -buildvcs=false -ldflags=-w -count=1 -json
TEST     := CGO_ENABLED=1 scripts/with-namespaces $(GO) test $(FAST) -trimpath -race
PLAIN    := CGO_ENABLED=0 scripts/with-namespaces $(GO) test $(FAST) -trimpath
REPORT   := $(GO) run -buildvcs=false ./scripts/testreport

# What drives the built program runs after the tests of packages, one group after the other: beside more work than the machine has
# processors for, a client or a server of a test might wait for longer than the program does. The race detector would see only the
# load of DRIVEN, and take twice its CPU time. The attacks keep it: without it they are three times as strong, and a new client of
# the attacker's address may be evicted with it.
LONGEST := ./iptables ./inbound ./internal/httpforward ./cmd/pillion # begin first
STORIES := ./e2e
PODS    := ./e2e/pods
ATTACKS := ./e2e/hostility
DRIVEN  := ./e2e/bench

# Other people's clients and servers for the e2e tests: a module of its own.
PEERS := e2e/testdata/peers

# A control plane for tests of its client: likewise.
CONTROLPLANE := e2e/testdata/controlplane

# istiod, for tests of the same client: likewise. It has a thousand packages, which compile in two thirds of the time
# without optimization.
ISTIOD := e2e/testdata/istiod
IN_ISTIOD := cd $(ISTIOD) && CGO_ENABLED=0
ISTIOD_BUILD := -buildvcs=false '-gcflags=all=-N -l -dwarf=false'
TEST_ISTIOD  = $(CURDIR)/scripts/with-namespaces $(GO) test -vet=off $(ISTIOD_BUILD) -ldflags=-w -count=1 -json -timeout 30m

# Kubernetes' own types and decoder, and kustomize, helm and Prometheus' parser, for the tests of what is injected and of
# what is in deploy: likewise. Tests of injection build it without cgo, and so what has been compiled serves all.
KUBERNETES := e2e/testdata/kubernetes
IN_KUBERNETES := cd $(KUBERNETES) && CGO_ENABLED=0

# staticcheck and govulncheck: a module of their own, too.
TOOLS := scripts/tools

# What drives a browser, as npm installs it from the lock file. npm writes this file last.
BROWSER := $(PEERS)/page/node_modules/.package-lock.json

# The packages whose tests make network namespaces, e2e aside.
IN_NAMESPACES = git grep -l --untracked -E 'pillion/internal/nettest"|^package nettest' -- '*_test.go' ':!e2e' | xargs -n1 dirname | sort -u | sed 's|^|./|'

##@ Try it
.PHONY: demo
demo: tools-demo build ## show real traffic captured and forwarded, in namespaces that vanish afterwards
	scripts/demo bin/pillion

# The environment passes CMD as it was typed, so that one shell in the namespace runs all of a compound command.
.PHONY: try
try: export TRY_COMMAND = $(value CMD)
try: tools-try build ## run CMD, a shell by default, in a namespace where pillion captures and logs its traffic
	@if [[ -n $$TRY_COMMAND ]]; then scripts/try bin/pillion bash -c "$$TRY_COMMAND"; else scripts/try bin/pillion "$${SHELL:-bash}"; fi

##@ Build
.PHONY: build
build: ## build bin/pillion and bin/pillionctl: static, without symbols, with their version
	$(BUILD) -o bin/ ./cmd/...

# The time of the last commit is the time of everything in an image. GOARCH=arm64 makes an image for arm64, and
# ARCHS="amd64 arm64" an index of images for both. image-iptables also has programs of Debian, which no SBOM here lists.
ARCHS ?= $(shell $(GO) env GOARCH)
.PHONY: image image-iptables image-pillionctl
image: tools-image modules build ## bin/image.tar: an OCI image of the binary, with its SBOM; ARCHS="amd64 arm64" makes an index
image-iptables: tools-image modules build ## bin/image-iptables.tar: the same with this machine's iptables programs
image-pillionctl: tools-image modules build ## bin/image-pillionctl.tar: the webhook's
image image-iptables image-pillionctl: PROGRAM = $(if $(filter %ctl,$@),pillionctl,pillion)
image image-iptables image-pillionctl:
	@for arch in $(ARCHS); do GOARCH=$$arch $(BUILD) -o bin/$$arch/ ./cmd/$(PROGRAM); done
	@VERSION=$(VERSION) EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 0) ARCH="$(ARCHS)" \
		scripts/image $@ bin/%/$(PROGRAM) bin/$@.tar
	@[ $@ = image-iptables ] || for arch in $(ARCHS); do env -u GOARCH $(GO) tool -modfile=$(TOOLS)/go.mod cyclonedx-gomod bin \
		-json -std -noserial -version $(VERSION) -output bin/$@-$$arch.cdx.json bin/$$arch/$(PROGRAM); done

.PHONY: program
program:
	@$(BUILD) -o $(OUT) ./cmd/pillion

.PHONY: size
size: build ## build, and fail if bin/pillion is larger than MAX_BINARY bytes
	@size=$$(stat -c %s bin/pillion); echo "bin/pillion: $$size bytes of at most $(MAX_BINARY)"; [ $$size -le $(MAX_BINARY) ]

.PHONY: clean
clean: ## remove what build and the tests leave in this directory
	rm -rf bin $(PEERS)/page/node_modules
	find . -name '*.test' -o -name '*.prof' -o -name '*.out' | xargs -r rm -f

##@ Test
# $(call CHECKED,REPEAT,COMMANDS) reports on tests, and repeats those that failed by REPEAT, alone.
CHECKED = again=$$(mktemp); trap 'rm -f "$$again"' EXIT; \
	{ failed=0; $(2); exit $$failed; } | $(REPORT) -failed "$$again" || scripts/again "$$again" env $(1) -vet=off -timeout 20m

.PHONY: test
test: tools-test modules $(BROWSER) lint manifests controlplane ## install what the tests need and run them: lint, manifests, unit, namespace and e2e tests
	$(call CHECKED,$(TEST),packages=$$($(GO) list ./... | grep -v /e2e) || failed=1; \
	$(TEST) -vet=off -timeout 40m $(LONGEST) $$packages || failed=1; \
	$(TEST) -vet=off -timeout 40m $(STORIES) || failed=1)

.PHONY: test-load
test-load: tools-test modules ## images in real pods, attacks on the agent, and the load of the figures: what test leaves out
	$(call CHECKED,$(TEST),$(TEST) -vet=off -timeout 20m $(PODS) || failed=1; \
	$(TEST) -vet=off -timeout 20m $(ATTACKS) || failed=1)
	$(call CHECKED,$(PLAIN),$(PLAIN) -vet=off -timeout 20m $(DRIVEN) || failed=1)

.PHONY: test-unit
test-unit: modules ## tests of single packages; those that need root skip without it
	$(TEST) -timeout 5m $$($(GO) list ./... | grep -v /e2e) | $(REPORT)

# Files with tests that the race detector would distort: of memory and allocations. e2e has such a file, too, but runs with and
# without the detector alike.
WITHOUT_RACE = git grep -l --untracked '^//go:build !race' -- '*_test.go' ':!e2e'

.PHONY: test-norace
test-norace: modules ## tests of memory and allocations, which the race detector would distort
	$(PLAIN) -timeout 5m -run "^($$($(WITHOUT_RACE) | xargs grep -hoP '^func \KTest\w+' | sort -u | paste -sd'|'))\$$" \
		$$($(WITHOUT_RACE) | xargs -n1 dirname | sort -u | sed 's|^|./|') | $(REPORT)

.PHONY: test-netns
test-netns: tools-test modules ## tests that make network namespaces, without e2e
	$(TEST) -timeout 5m $$($(IN_NAMESPACES)) | $(REPORT)

.PHONY: e2e
e2e: tools-test modules $(BROWSER) ## the built binary under real rules, one file for each promise (RUN=pattern chooses)
	{ $(TEST) -timeout 40m -run '$(RUN)' $(STORIES) $(PODS) || failed=1; \
	$(TEST) -timeout 40m -run '$(RUN)' $(ATTACKS) || failed=1; \
	$(PLAIN) -timeout 20m -run '$(RUN)' $(DRIVEN) || failed=1; exit $${failed:-0}; } | $(REPORT)

.PHONY: test-pods
test-pods: tools-test modules ## the images, and real pods of them, by podman (RUN=pattern chooses)
	$(TEST) -timeout 5m -run '$(RUN)' $(PODS) | $(REPORT)

.PHONY: manifests
manifests: modules ## what is in deploy, as kustomize, helm, Kubernetes and Prometheus read it
	($(IN_KUBERNETES) $(GO) test -vet=off $(FAST) ./...) | $(REPORT)

.PHONY: controlplane
controlplane: modules ## the client of a control plane, against go-control-plane's server, and expressions, against cel-go
	(cd $(CONTROLPLANE) && CGO_ENABLED=0 $(GO) test -vet=off $(FAST) ./...) | $(REPORT)

.PHONY: test-istiod
test-istiod: ## the client of a control plane and the built agent, against a real istiod and istioctl; its first compilation takes 5 minutes (RUN=pattern chooses)
	$(IN_ISTIOD) $(GO) mod tidy -diff
	$(IN_ISTIOD) $(GO) vet $(ISTIOD_BUILD) ./...
	again=$$(mktemp); trap 'rm -f "$$again"' EXIT; \
	($(IN_ISTIOD) $(TEST_ISTIOD) -run '$(RUN)' ./...) | $(REPORT) -failed "$$again" || \
	scripts/again "$$again" env -C $(CURDIR)/$(ISTIOD) CGO_ENABLED=0 $(TEST_ISTIOD)

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (10s)
	FUZZTIME=$(FUZZTIME) scripts/fuzz

.PHONY: mutate
mutate: modules ## N mutants of PACKAGES, chosen by SEED: lists those that no test notices
	$(GO) run -buildvcs=false ./scripts/mutate -n $(N) -seed $(SEED) $(PACKAGES)

.PHONY: bench
bench: tools-bench ## the figures: pillion beside haproxy, net/http and a plain relay, in 7 to 20 minutes
	$(GO) test -buildvcs=false -count=1 -timeout 30m -run '^$$' -bench Figures -benchtime 1x ./e2e/bench

.PHONY: hostility
hostility: tools-bench ## attacks on the agent in 128 MiB: its memory, and the latencies of another client, in 15 minutes
	$(GO) test -buildvcs=false -count=1 -timeout 30m -run '^$$' -bench Hostility -benchtime 1x ./e2e/hostility

.PHONY: soak
soak: tools-test modules ## mixed traffic through two sidecars for SOAKTIME (10m) while routes change, every byte verified
	PILLION_SOAK=$(SOAKTIME) scripts/with-namespaces $(GO) test -buildvcs=false -count=1 -v -timeout 0 -run TestMixedTraffic ./e2e

.PHONY: lint
lint: ## formatting, vet, module files, shell syntax, plain English
	@unformatted=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); \
	if [ -n "$$unformatted" ]; then echo "gofmt would change: $$unformatted"; exit 1; fi
	$(GO) vet ./...
	CGO_ENABLED=0 GOARCH=arm64 $(GO) build ./...
	$(GO) mod tidy -diff
	cd $(PEERS) && $(GO) vet ./... && $(GO) mod tidy -diff
	cd $(CONTROLPLANE) && $(GO) vet ./... && $(GO) mod tidy -diff
	$(IN_KUBERNETES) $(GO) vet ./... && $(GO) mod tidy -diff
	cd $(TOOLS) && $(GO) mod tidy -diff
	@for script in .ci/run $$(find scripts -maxdepth 1 -type f); do bash -n "$$script"; done
	$(GO) run -buildvcs=false ./scripts/prose -comments $(PROSE_COMMENTS) -documents $(PROSE_DOCUMENTS)

.PHONY: staticcheck
staticcheck: modules ## staticcheck, in every module except istiod's, where it would analyse a thousand packages
	$(GO) tool -modfile=$(TOOLS)/go.mod staticcheck ./...
	cd $(PEERS) && $(GO) tool -modfile=$(CURDIR)/$(TOOLS)/go.mod staticcheck ./...
	cd $(CONTROLPLANE) && $(GO) tool -modfile=$(CURDIR)/$(TOOLS)/go.mod staticcheck -checks inherit,-SA1019 ./... # istiod sends deprecated fields
	$(IN_KUBERNETES) $(GO) tool -modfile=$(CURDIR)/$(TOOLS)/go.mod staticcheck ./...

.PHONY: vulncheck
vulncheck: modules ## known vulnerabilities in the code that the programs call
	scripts/vulncheck

.PHONY: test-arm64
test-arm64: tools-arm64 modules ## unit tests for arm64, by qemu-user
	scripts/test-arm64

##@ Other
# Before anything goes where there is no network.
.PHONY: modules
modules:
	@$(GO) mod download
	@cd $(PEERS) && $(GO) mod download
	@cd $(CONTROLPLANE) && $(GO) mod download
	@cd $(KUBERNETES) && $(GO) mod download
	@cd $(TOOLS) && $(GO) mod download

$(BROWSER): $(PEERS)/page/package-lock.json
	@cd $(PEERS)/page && npm ci --no-audit --no-fund --loglevel error >/dev/null

# They are silent when nothing is missing.
.PHONY: tools-demo tools-try tools-image tools-test tools-bench tools-arm64
tools-demo tools-try tools-image tools-test tools-bench tools-arm64: tools-%:
	@scripts/install-tools $*

.PHONY: help
help: ## this text
	@awk 'BEGIN { FS = ":.*## " } \
	/^##@/ { printf "\n%s\n", substr($$0, 5) } \
	/^[a-z0-9-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
