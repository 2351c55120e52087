# Every target works from a fresh clone. As root on Debian, what is missing is installed and built; elsewhere it is named.
KUBERNETES_VERSION ?= 1.36.3
# The oldest Kubernetes that the removal rule is held against: the first with stable matchConditions.
OLDEST_KUBERNETES ?= 1.30.14
# How often eni-sim releases addresses of pods that the API server no longer has; Terway does it every 5m.
GC_PERIOD ?= 5s
# How long each fuzz test of `make fuzz` runs.
FUZZTIME ?= 1m
# How many addresses eni-sim has.
POOL_SIZE ?= 128

VERSION := $(shell sed -n 's/^appVersion: *//p' charts/eni-guard/Chart.yaml)
IMAGE   := eni-guard.io/eni-guard
CLUSTER := bin/cluster --repo $(CURDIR) --kubernetes-version $(KUBERNETES_VERSION)
export CGO_ENABLED := 0
export GOWORK := off
export GOFLAGS := -trimpath -buildvcs=false

.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-conformance test-cluster test-e2e cluster-up cluster-down install image build lint bench fuzz go FORCE

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: install ## Replay the incident on a real cluster, without and with the guard
	@go run ./test/e2e/demo

test: test-unit test-conformance test-cluster test-e2e ## Run all tests, on a fresh cluster that stays up afterwards

test-unit: go ## Run the tests that need no cluster
	go test $$(go list ./... | grep -v /test/e2e)

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
	go test -count=1 -timeout 20m -parallel 8 -v ./test/e2e

cluster-up: bin/cluster ## Start a real one-node Kubernetes, anew if a part of it has died; kubeconfig in .cluster/kubeconfig
	@$(CLUSTER) up --gc-period $(GC_PERIOD) --pool-size $(POOL_SIZE)

cluster-down: bin/cluster ## Stop it and remove everything it made outside the checkout
	@bin/cluster down

# The tag names the content, so that a changed binary rolls out.
install: cluster-up image ## Install the guard with Helm into the running cluster
	@bin/cluster load dist/eni-guard.tar
	@.cluster/bin/helm --kubeconfig .cluster/kubeconfig upgrade --install eni-guard charts/eni-guard \
		--namespace eni-guard --create-namespace --wait --timeout 2m \
		--set image.tag=$$(cat dist/eni-guard.tag) --set agent.criSocket=/run/eni-guard-cluster/containerd.sock >dist/helm.log \
		|| { cat dist/helm.log; exit 1; }
	@.cluster/bin/kubectl --kubeconfig .cluster/kubeconfig --namespace eni-guard get pods

image: build bin/cluster ## Build the image, an OCI archive in dist/eni-guard.tar, without a container engine
	@mkdir -p dist
	@echo "$(VERSION)-$$(sha256sum bin/eni-guard | cut -c1-12)" >dist/eni-guard.tag
	@bin/cluster image dist/eni-guard.tar $(IMAGE):$$(cat dist/eni-guard.tag) bin/eni-guard
	@echo "dist/eni-guard.tar holds $(IMAGE):$$(cat dist/eni-guard.tag)"

build: go ## Build bin/eni-guard
	go build -ldflags '-s -w -X github.com/eni-guard/eni-guard/internal/version.Version=$(VERSION)' -o bin/eni-guard .

bench: install ## Run the benchmarks, those of one part on one core, those end to end on the cluster
	go test -run '^$$' -bench . -benchmem -cpu 1 ./webhook/... ./internal/...
	go test -run '^$$' -bench . -benchtime 20x -timeout 20m ./test/e2e

fuzz: go ## Look for input that does harm; FUZZTIME=10m looks longer
	go test ./webhook -run '^$$' -fuzz FuzzReview -fuzztime $(FUZZTIME) -fuzzminimizetime 10x
	go test ./webhook -run '^$$' -fuzz FuzzOverride -fuzztime $(FUZZTIME) -fuzzminimizetime 10x

lint: bin/golangci-lint bin/cluster ## Check the code, the modules and the chart
	bin/golangci-lint run ./...
	cd hack/cluster && ../../bin/golangci-lint run ./...
	go mod tidy -diff
	go -C hack/cluster mod tidy -diff
	$(CLUSTER) build
	.cluster/bin/helm lint --strict --quiet charts/eni-guard

bin/cluster: go FORCE
	@go -C hack/cluster build -o ../../bin/cluster .

bin/golangci-lint: hack/lint/go.mod | go
	go -C hack/lint build -o ../../bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint

go:
	@command -v go >/dev/null || { echo "missing: Go $$(sed -n 's/^go //p' go.mod) or newer (https://go.dev/dl)"; exit 1; }
