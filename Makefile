.DEFAULT_GOAL := help
.PHONY: help build test race lint fuzz torture demo image ci

VERSION ?=
TORTURE_TIME ?= 1h
TORTURE_FLAGS ?=

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build bin/ebb, static and without paths of this machine (VERSION=v1.2.3 for a release)
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.buildVersion=$(VERSION)" -o bin/ebb ./cmd/ebb

test: ## Run all tests against a real Postgres and a real NATS server
	go test ./...

race: ## Run the shorter tests with the race detector
	.ci/run race

lint: ## Check formatting and run the linters
	.ci/run format vet lint

fuzz: ## Run every fuzz target (FUZZ_TIME=3s each)
	.ci/run fuzz

torture: ## Have everything fail for TORTURE_TIME (1h), and count what is missing (TORTURE_FLAGS: go run ./bench/torture -h)
	go run ./bench/torture --total $(TORTURE_TIME) --duration 60s $(TORTURE_FLAGS)

demo: ## Show the whole way of an event on this machine
	go run ./cmd/ebb demo

image: ## Build the container image ebb
	docker build --build-arg VERSION="$(VERSION)" -t ebb .

ci: ## Run everything that must hold
	.ci/run
