package main

import (
	"archive/tar"
	"bytes"
	"context"
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

// writeImage writes an OCI archive with one image: files maps paths in the image to files of this machine, links maps
// symbolic links in the image to their targets. The image's entry point is the one file. The content alone decides the
// digest: no time, no owner and no order of this machine enters it.
func writeImage(archive, reference string, files, links map[string]string) error {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, path := range slices.Sorted(maps.Keys(files)) {
		content, err := os.ReadFile(files[path])
		if err != nil {
			return err
		}
		if err := writeTarFile(w, strings.TrimPrefix(path, "/"), 0o755, content); err != nil {
			return err
		}
	}
	for _, path := range slices.Sorted(maps.Keys(links)) {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: strings.TrimPrefix(path, "/"), Linkname: links[path], Mode: 0o777})
		if err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	content, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(layer.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.AppendLayers(image, content); err != nil {
		return err
	}
	configFile, err := image.ConfigFile()
	if err != nil {
		return err
	}
	configFile = configFile.DeepCopy()
	configFile.OS, configFile.Architecture = "linux", runtime.GOARCH
	configFile.Config = v1.Config{Entrypoint: slices.Sorted(maps.Keys(files)), Env: []string{"PATH=/bin"}, WorkingDir: "/"}
	if image, err = mutate.ConfigFile(image, configFile); err != nil {
		return err
	}
	return writeArchive(archive, reference, image)
}

// writeArchive writes the image as a tar of an OCI layout, named the way `ctr images import` expects it.
func writeArchive(archive, reference string, image v1.Image) error {
	dir, err := os.MkdirTemp("", "oci-layout-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	err = path.AppendImage(image, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          reference,
		"org.opencontainers.image.ref.name": reference,
	}))
	if err != nil {
		return err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	err = fs.WalkDir(os.DirFS(dir), ".", func(name string, entry fs.DirEntry, err error) error {
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
	pause := cfg.path("images/pause.tar")
	if err := writeImage(pause, pauseImage, map[string]string{"/pause": cfg.binary("pause")}, nil); err != nil {
		return err
	}
	applets, err := exec.CommandContext(ctx, busyboxBinary, "--list").Output()
	if err != nil {
		return fmt.Errorf("%s --list: %w", busyboxBinary, err)
	}
	links := map[string]string{}
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet != "busybox" {
			links["/bin/"+applet] = "busybox"
		}
	}
	busybox := cfg.path("images/busybox.tar")
	if err := writeImage(busybox, busyboxImage, map[string]string{"/bin/busybox": busyboxBinary}, links); err != nil {
		return err
	}
	for _, archive := range []string{pause, busybox} {
		if err := load(ctx, archive); err != nil {
			return err
		}
	}
	return nil
}

// load imports an OCI archive into the node's containerd, in the namespace the kubelet uses.
func load(ctx context.Context, archive string) error {
	if _, err := os.Stat(archive); err != nil {
		return err
	}
	if _, err := os.Stat(runtimeSock); err != nil {
		return fmt.Errorf("no cluster is running here (%s is missing): run `make cluster-up` first", runtimeSock)
	}
	out, err := exec.CommandContext(ctx, "ctr", "--address", runtimeSock, "--namespace", "k8s.io", "images", "import", archive).CombinedOutput()
	if err != nil {
		return fmt.Errorf("importing %s into the node: %w\n%s", archive, err, lastLines(string(out), 5))
	}
	return nil
}
