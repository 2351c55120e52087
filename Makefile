# Every target works from a fresh clone. As root on Debian, what is missing is installed and built; elsewhere it is named.
KUBERNETES_VERSION ?= 1.36.3
# The containerd to build and run; Debian's if empty.
CONTAINERD_VERSION ?=
# The oldest Kubernetes that the removal rule is held against: the first with stable matchConditions.
OLDEST_KUBERNETES ?= 1.30.14
# Where `make vulncheck` finds what is known.
VULNDB ?= https://vuln.go.dev
# How often eni-sim releases addresses of pods that the API server no longer has; Terway does it every 5m.
GC_PERIOD ?= 2s
# How long each fuzz test of `make fuzz` runs.
FUZZTIME ?= 1m
# How large the log is that `make bench` reviews, in MiB.
AUDIT_LOG_MIB ?= 1024
# How long `make test-chaos` breaks things, and what its random choices begin with: a seed that a run has printed, or 0.
CHAOS_LENGTH ?= 8m
CHAOS_SEED ?= 0
# How many addresses eni-sim has.
POOL_SIZE ?= 160

# What `make test-containerd` runs.
RUNTIME_TESTS := ^(TestIncident|TestInspect|TestAFrozenProcess|TestAProcessOutside|TestARuntime|TestASandboxWhoseRecordIsGone|TestOtherValues|TestAHeldStuckPod|TestAddressesOfEitherFamily)

VERSION := $(shell sed -n 's/^appVersion: *//p' charts/eni-guard/Chart.yaml)
IMAGE   := eni-guard.io/eni-guard
# The processors that `make image` builds for. `make install` needs that of this machine alone.
ARCHS   ?= amd64 arm64
# Without gRPC's tracing, whose templates would keep every method of the Kubernetes API in the binary: a quarter of it.
BUILD   := go build -tags grpcnotrace -ldflags '-s -w -X github.com/eni-guard/eni-guard/internal/version.Version=$(VERSION)'
CLUSTER := bin/cluster --repo $(CURDIR) --kubernetes-version $(KUBERNETES_VERSION) --containerd-version "$(CONTAINERD_VERSION)"
export CGO_ENABLED := 0
export GOWORK := off
export GOFLAGS := -trimpath -buildvcs=false

.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-chart test-conformance test-cluster test-e2e test-image test-containerd test-crio test-chaos cluster-up cluster-down install image build generate lint vulncheck bench bench-scale fuzz go FORCE

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: install ## Replay the incident on a real cluster, without and with the guard
	@go run ./test/e2e/demo

# One after the other: while the conformance tests have one of two cores, a request that holds a hundred pods may take more than the minute
# that the API server gives it.
test: test-unit test-chart test-cluster test-conformance test-e2e ## Run all tests, on a fresh cluster that stays up afterwards
	@$(MAKE) --no-print-directory test-chaos CHAOS_LENGTH=60s CHAOS_SEED=1795578573

test-unit: bin/cluster ## Run the tests that need no cluster
	@bin/cluster packages chromium
	go test $$(go list ./... | grep -v -e '/test/e2e$$' -e /test/e2e/chaos)

test-chart: go ## Test the chart, and what is generated from it, without a cluster
	go -C hack/chart test -timeout 10m ./...

test-conformance: go bin/cluster ## Hold the removal rule and its CEL against real API servers, the default and the oldest one
	@set -e; for version in $(KUBERNETES_VERSION) $(OLDEST_KUBERNETES); do \
		bin/cluster --kubernetes-version $$version apiserver .cluster/apiserver-$$version; \
		ENI_GUARD_APISERVER=$(CURDIR)/.cluster/apiserver-$$version \
			go test -tags conformance -count=1 -timeout 10m -v -run '^(TestConformance|TestChart)' ./webhook; \
	done

test-cluster: go bin/cluster ## Test hack/cluster: eni-sim, stuckfs, and that cluster-down leaves nothing behind
	@bin/cluster down
	$(CLUSTER) build
	go -C hack/cluster test -timeout 15m -p 1 ./...

test-e2e: install ## Run the end-to-end tests on the cluster
	go test -count=1 -timeout 45m -parallel 12 -v ./test/e2e

test-chaos: install ## Break every part under load, and look from outside whether a pod's object goes before its sandbox
	go test -count=1 -timeout 40m -v ./test/e2e/chaos -args -length $(CHAOS_LENGTH) -seed $(CHAOS_SEED)

test-containerd: ## Run the tests of what depends on the container runtime, with containerd 1.7 and 2; the cluster is down afterwards
	@set -e; for version in 1.7.35 2.4.2; do \
		$(MAKE) --no-print-directory cluster-down; \
		$(MAKE) --no-print-directory install CONTAINERD_VERSION=$$version; \
		go test -count=1 -timeout 20m -parallel 8 -v -run '$(RUNTIME_TESTS)' ./test/e2e \
			|| { echo "this was containerd $$version; the cluster is still up, for a look: make cluster-down ends it"; exit 1; }; \
	done
	@$(MAKE) --no-print-directory cluster-down

test-crio: go bin/cluster ## Run the test of the agent with a real CRI-O, which is built for it; the cluster is down afterwards
	@bin/cluster down
	@bin/cluster --repo $(CURDIR) crio .cluster/crio
	ENI_GUARD_CRIO=$(CURDIR)/.cluster/crio go test -tags crio -count=1 -timeout 10m -v -run '^TestCRIO$$' ./internal/agent

cluster-up: bin/cluster ## Start a real one-node Kubernetes, anew if a part of it has died; kubeconfig in .cluster/kubeconfig
	@$(CLUSTER) up --gc-period $(GC_PERIOD) --pool-size $(POOL_SIZE)

cluster-down: bin/cluster ## Stop it and remove everything it made outside the checkout
	@bin/cluster down

# The tag names the content, so that a changed binary rolls out. What is left over is called so sooner than elsewhere.
install: ARCHS = $(shell go env GOARCH)
install: cluster-up image ## Install the guard with Helm into the running cluster
	@bin/cluster load dist/eni-guard.tar
	@.cluster/bin/helm --kubeconfig .cluster/kubeconfig upgrade --install eni-guard charts/eni-guard \
		--namespace eni-guard --create-namespace --wait --timeout 2m \
		--set image.tag=$$(cat dist/eni-guard.tag) --set agent.criSocket=/run/eni-guard-cluster/containerd.sock --set agent.leftoverGraceSeconds=2 >dist/helm.log \
		|| { cat dist/helm.log; exit 1; }
	@.cluster/bin/kubectl --kubeconfig .cluster/kubeconfig --namespace eni-guard get pods

image: build bin/cluster ## Build the image, an OCI archive in dist/eni-guard.tar, without a container engine, and what it is made of beside it
	@for arch in $(ARCHS); do GOARCH=$$arch $(BUILD) -o bin/$$arch/eni-guard . || exit 1; done
	@rm -rf dist/eni-guard* && mkdir -p dist
	@echo "$(VERSION)-$$(cat $(ARCHS:%=bin/%/eni-guard) | sha256sum | cut -c1-12)" >dist/eni-guard.tag
	@bin/cluster image dist/eni-guard.tar $(IMAGE):$$(cat dist/eni-guard.tag) $(foreach arch,$(ARCHS),$(arch)=bin/$(arch)/eni-guard)
	@echo "dist/eni-guard.tar holds $(IMAGE):$$(cat dist/eni-guard.tag) for $(ARCHS)"

build: go ## Build bin/eni-guard
	$(BUILD) -o bin/eni-guard .

test-image: image ## Build the image once more, elsewhere and from nothing, and compare it, and what it is made of
	@set -e; elsewhere=$$(mktemp -d); trap 'rm -rf $$elsewhere' EXIT; \
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t $$elsewhere; \
	GOCACHE=$$elsewhere/.cache $(MAKE) --no-print-directory -C $$elsewhere image ARCHS='$(ARCHS)'; \
	for file in eni-guard.tar $(ARCHS:%=eni-guard-%.cdx.json); do cmp dist/$$file $$elsewhere/dist/$$file; sha256sum dist/$$file; done

generate: go ## Write what follows from the chart: config/ and its table of values
	go -C hack/chart run . $(CURDIR)

bench: install ## Run the benchmarks, those of one part on one core, those end to end on the cluster
	@$(CLUSTER) crictl
	@bin/cluster packages jq
	AUDIT_LOG_MIB=$(AUDIT_LOG_MIB) go test -run '^$$' -bench . -benchmem -cpu 1 ./webhook/... ./internal/...
	go test -run '^$$' -bench . -benchtime 20x -timeout 20m ./test/e2e

bench-scale: build bin/cluster ## Measure the webhook on a real API server with 5,000 nodes and 100,000 pods, and agents simulated in one process
	@bin/cluster --kubernetes-version $(KUBERNETES_VERSION) apiserver .cluster/apiserver-$(KUBERNETES_VERSION)
	ENI_GUARD_APISERVER=$(CURDIR)/.cluster/apiserver-$(KUBERNETES_VERSION) ENI_GUARD_BIN=$(CURDIR)/bin \
		go test -run '^$$' -bench . -benchtime 1x -timeout 20m -v ./test/scale

fuzz: go ## Look for input that does harm; FUZZTIME=10m looks longer
	go test ./webhook -run '^$$' -fuzz FuzzReview -fuzztime $(FUZZTIME) -fuzzminimizetime 10x
	go test ./webhook -run '^$$' -fuzz FuzzOverride -fuzztime $(FUZZTIME) -fuzzminimizetime 10x
	go test ./internal/auditlog -run '^$$' -fuzz FuzzSelection -fuzztime $(FUZZTIME) -fuzzminimizetime 10x

lint: bin/golangci-lint bin/cluster ## Check the code, the modules and the chart
	bin/golangci-lint run --allow-parallel-runners ./...
	cd hack/cluster && ../../bin/golangci-lint run --allow-parallel-runners ./...
	cd hack/chart && ../../bin/golangci-lint run --allow-parallel-runners ./...
	go mod tidy -diff
	go -C hack/cluster mod tidy -diff
	go -C hack/chart mod tidy -diff
	$(CLUSTER) build
	.cluster/bin/helm lint --strict --quiet charts/eni-guard

vulncheck: bin/govulncheck ## Look for known vulnerabilities in what is built; needs https://vuln.go.dev
	@curl -fsS -o /dev/null $(VULNDB)/index/db.json || { echo "the database of vulnerabilities cannot be reached at $(VULNDB): make vulncheck VULNDB=URL takes a copy of it"; exit 1; }
	bin/govulncheck -db $(VULNDB) ./...

bin/cluster: go FORCE
	@go -C hack/cluster build -o ../../bin/cluster .

bin/govulncheck: hack/lint/go.mod | go
	go -C hack/lint build -o ../../bin/govulncheck golang.org/x/vuln/cmd/govulncheck

bin/golangci-lint: hack/lint/go.mod | go
	go -C hack/lint build -o ../../bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint

go:
	@command -v go >/dev/null || { echo "missing: Go $$(sed -n 's/^go //p' go.mod) or newer (https://go.dev/dl)"; exit 1; }
