package main

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// content is what an image holds. The content alone decides the digest: no time, no owner and no order of this machine enters it.
type content struct {
	// arch is the processor that it is for, as in GOARCH.
	arch string
	// user is who runs it, UID:GID; root if empty.
	user string
	// files maps paths in the image to files of this machine. If it is one, it is the entry point.
	files map[string]string
	// links maps symbolic links in the image to their targets.
	links map[string]string
}

// image makes an image of one layer.
func (c content) image() (v1.Image, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, path := range slices.Sorted(maps.Keys(c.files)) {
		content, err := os.ReadFile(c.files[path])
		if err != nil {
			return nil, err
		}
		if err := writeTarFile(w, strings.TrimPrefix(path, "/"), 0o755, content); err != nil {
			return nil, err
		}
	}
	for _, path := range slices.Sorted(maps.Keys(c.links)) {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: strings.TrimPrefix(path, "/"), Linkname: c.links[path], Mode: 0o777})
		if err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	packed, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(layer.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.AppendLayers(image, packed); err != nil {
		return nil, err
	}
	configFile, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	configFile = configFile.DeepCopy()
	configFile.OS, configFile.Architecture = "linux", c.arch
	configFile.Config = v1.Config{Entrypoint: slices.Sorted(maps.Keys(c.files)), Env: []string{"PATH=/bin"}, WorkingDir: "/", User: c.user}
	return mutate.ConfigFile(image, configFile)
}

// writeImage writes an OCI archive, named the way `ctr images import` expects it: one image, or one for each of some processors.
func writeImage(archive, reference string, contents ...content) error {
	names := layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          reference,
		"org.opencontainers.image.ref.name": reference,
	})
	dir, err := os.MkdirTemp("", "oci-layout-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, c := range contents {
		image, err := c.image()
		if err != nil {
			return err
		}
		if len(contents) == 1 {
			return errors.Join(path.AppendImage(image, names), writeArchive(archive, dir))
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: c.arch}},
		})
	}
	if err := path.AppendIndex(index, names); err != nil {
		return err
	}
	return writeArchive(archive, dir)
}

// writeArchive writes an OCI layout as a tar file.
func writeArchive(archive, dir string) error {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		return writeTarFile(w, name, 0o644, content)
	})
	if err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(archive), 0o755); err != nil {
		return err
	}
	return os.WriteFile(archive, out.Bytes(), 0o644)
}

func writeTarFile(w *tar.Writer, name string, mode int64, content []byte) error {
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content)), ModTime: time.Unix(0, 0)}
	if err := w.WriteHeader(header); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

// loadNodeImages imports the sandbox image and the image of test workloads; there is no registry to pull them from.
func loadNodeImages(ctx context.Context, cfg config) error {
	archives, err := writeNodeImages(ctx, cfg, cfg.path("images"))
	if err != nil {
		return err
	}
	for _, archive := range archives {
		if err := load(ctx, archive); err != nil {
			return err
		}
	}
	return nil
}

// writeNodeImages writes these as pause.tar and busybox.tar into dir.
func writeNodeImages(ctx context.Context, cfg config, dir string) ([]string, error) {
	pause := filepath.Join(dir, "pause.tar")
	if err := writeImage(pause, pauseImage, content{arch: runtime.GOARCH, files: map[string]string{"/pause": cfg.binary("pause")}}); err != nil {
		return nil, err
	}
	applets, err := exec.CommandContext(ctx, busyboxBinary, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", busyboxBinary, err)
	}
	links := map[string]string{}
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet != "busybox" {
			links["/bin/"+applet] = "busybox"
		}
	}
	busybox := filepath.Join(dir, "busybox.tar")
	if err := writeImage(busybox, busyboxImage, content{arch: runtime.GOARCH, files: map[string]string{"/bin/busybox": busyboxBinary}, links: links}); err != nil {
		return nil, err
	}
	return []string{pause, busybox}, nil
}

// load imports an OCI archive into the node's containerd, in the namespace the kubelet uses.
func load(ctx context.Context, archive string) error {
	if _, err := os.Stat(archive); err != nil {
		return err
	}
	state, err := readHostState()
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("no cluster is running here (%s is missing): run `make cluster-up` first", hostStateFile)
	}
	if err != nil {
		return err
	}
	cfg := state.config()
	out, err := exec.CommandContext(ctx, cfg.containerdBinary("ctr"), "--address", runtimeSock, "--namespace", "k8s.io", "images", "import", archive).CombinedOutput()
	if err != nil {
		return fmt.Errorf("importing %s into the node: %w\n%s", archive, err, lastLines(string(out), 5))
	}
	return nil
}

// nobody is who runs the guard's image where its pod does not say: it needs no right of any user.
const nobody = "65532:65532"

// guardImage writes the image of a program for several processors, each given as ARCH=BINARY, and what it is made of beside it.
func guardImage(archive, reference string, binaries []string) error {
	var contents []content
	for _, text := range binaries {
		arch, binary, found := strings.Cut(text, "=")
		if !found || arch == "" || binary == "" {
			return fmt.Errorf("%q is not ARCH=BINARY, such as arm64=bin/arm64/eni-guard", text)
		}
		info, err := buildinfo.ReadFile(binary)
		if err != nil {
			return err
		}
		for _, setting := range info.Settings {
			if setting.Key == "GOARCH" && setting.Value != arch {
				return fmt.Errorf("%s is for %s, not for %s", binary, setting.Value, arch)
			}
			if setting.Key == "CGO_ENABLED" && setting.Value != "0" {
				return fmt.Errorf("%s is not static: build it with CGO_ENABLED=0, there is nothing else in the image", binary)
			}
		}
		contents = append(contents, content{arch: arch, user: nobody, files: map[string]string{"/" + filepath.Base(binary): binary}})
		if err := writeMaterials(strings.TrimSuffix(archive, ".tar")+"-"+arch+".cdx.json", info); err != nil {
			return err
		}
	}
	return writeImage(archive, reference, contents...)
}
