FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY . .
ARG VERSION=
ARG TARGETOS TARGETARCH
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    GOOS=$TARGETOS GOARCH=$TARGETARCH make build VERSION="$VERSION"

# It holds CA certificates and the user nonroot (65532), and no shell.
FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /src/bin/ebb /ebb
# ebb.yaml is read from here when it is mounted, and the embedded server's store is made here.
WORKDIR /home/nonroot
USER 65532:65532
EXPOSE 7070
# 0 is healthy; 3 says that a check fell short, 1 that Postgres cannot be asked.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["/ebb", "status"]
ENTRYPOINT ["/ebb"]
CMD ["run"]
