# For those who build images with an engine; `make image` needs none, and makes a reproducible one.
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/eni-guard:TAG --push .
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETARCH
RUN GOARCH=$TARGETARCH make build

FROM scratch
COPY --from=build /src/bin/eni-guard /eni-guard
# The webhook needs no right of any user; the agent's pod says that it runs as root.
USER 65532:65532
ENTRYPOINT ["/eni-guard"]
