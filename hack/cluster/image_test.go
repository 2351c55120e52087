package main

import (
	"archive/tar"
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// built compiles a small program of this module for a processor, and returns its path: one of its own each time.
func built(t *testing.T, arch string) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "pause")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", binary, "./pause")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return binary
}

// Neither when nor where it was built is in an image.
func TestAnImageIsReproducible(t *testing.T) {
	var archives [][]byte
	for i := range 2 {
		binaries := []string{}
		for _, arch := range []string{"amd64", "arm64"} {
			binary := built(t, arch)
			then := time.Unix(int64(i)*1e9, 0)
			if err := os.Chtimes(binary, then, then); err != nil {
				t.Fatal(err)
			}
			binaries = append(binaries, arch+"="+binary)
		}
		archive := filepath.Join(t.TempDir(), "dist", "image.tar")
		if err := os.MkdirAll(filepath.Dir(archive), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := guardImage(archive, "example.org/pause:1", binaries); err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(archive)
		if err != nil {
			t.Fatal(err)
		}
		archives = append(archives, content)
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("two builds make two images")
	}
	files := unpack(t, archives[0])
	var outer, inner v1.IndexManifest
	parse(t, files["index.json"], &outer)
	if len(outer.Manifests) != 1 || outer.Manifests[0].Annotations["io.containerd.image.name"] != "example.org/pause:1" {
		t.Fatalf("the archive names %+v", outer.Manifests)
	}
	parse(t, blob(files, outer.Manifests[0].Digest), &inner)
	var platforms []string
	for _, described := range inner.Manifests {
		platforms = append(platforms, described.Platform.String())
		var manifest v1.Manifest
		parse(t, blob(files, described.Digest), &manifest)
		var config v1.ConfigFile
		parse(t, blob(files, manifest.Config.Digest), &config)
		if config.OS+"/"+config.Architecture != described.Platform.String() || config.Config.User != "65532:65532" ||
			!slices.Equal(config.Config.Entrypoint, []string{"/pause"}) || !config.Created.IsZero() {
			t.Errorf("%s: %+v", described.Platform, config)
		}
	}
	if !slices.Equal(platforms, []string{"linux/amd64", "linux/arm64"}) {
		t.Errorf("the image is for %v", platforms)
	}
}

// What is in a program is in its bill of materials, with the sums by which it was downloaded.
func TestMaterials(t *testing.T) {
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for range 2 {
		file := filepath.Join(t.TempDir(), "bom.json")
		if err := writeMaterials(file, info); err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, string(content))
	}
	if texts[0] != texts[1] {
		t.Error("the same program has two bills")
	}
	bom := new(cdx.BOM)
	if err := cdx.NewBOMDecoder(strings.NewReader(texts[0]), cdx.BOMFileFormatJSON).Decode(bom); err != nil {
		t.Fatal(err)
	}
	if bom.Metadata.Component.Name != "github.com/eni-guard/eni-guard/hack/cluster" {
		t.Errorf("it is about %+v", bom.Metadata.Component)
	}
	if len(*bom.Components) != len(info.Deps)+1 {
		t.Errorf("%d components, want %d modules and the standard library", len(*bom.Components), len(info.Deps))
	}
	sums, err := os.ReadFile("go.sum")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range *bom.Components {
		if c.Name == "std" {
			continue
		}
		if !strings.Contains(string(sums), c.Name+" "+c.Version+" h1:") || c.Hashes == nil || len((*c.Hashes)[0].Value) != 64 || !strings.HasPrefix(c.PackageURL, "pkg:golang/"+c.Name+"@v") {
			t.Errorf("%+v", c)
		}
	}
}

func TestWrongBinariesAreNamed(t *testing.T) {
	binary := built(t, "arm64")
	for text, want := range map[string]string{
		binary:            "is not ARCH=BINARY",
		"amd64=" + binary: "is for arm64, not for amd64",
		"amd64=/nowhere":  "no such file",
	} {
		err := guardImage(filepath.Join(t.TempDir(), "image.tar"), "example.org/pause:1", []string{text})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func unpack(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func blob(files map[string][]byte, digest v1.Hash) []byte {
	return files["blobs/"+digest.Algorithm+"/"+digest.Hex]
}

func parse(t *testing.T, text []byte, into any) {
	t.Helper()
	if err := json.Unmarshal(text, into); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
}
