package main

import (
	"context"
	"fmt"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// fileName is the one file of the file system.
const fileName = "data"

// mount mounts the file system on dir and serves it until this process ends.
func mount(dir string) error {
	options := &fs.Options{MountOptions: fuse.MountOptions{
		AllowOther:        true,
		DirectMountStrict: true, // as root: fusermount is not needed, and not fallen back to
		FsName:            "stuckfs",
		Name:              "stuckfs",
		Options:           []string{"default_permissions"},
	}}
	if _, err := fs.Mount(dir, &root{}, options); err != nil {
		return fmt.Errorf("mount on %s: %w", dir, err)
	}
	return nil
}

// root is the top directory.
type root struct{ fs.Inode }

var (
	_ fs.NodeOnAdder   = (*root)(nil)
	_ fs.NodeGetattrer = (*root)(nil)
)

func (r *root) OnAdd(ctx context.Context) {
	r.AddChild(fileName, r.NewPersistentInode(ctx, &file{}, fs.StableAttr{Mode: syscall.S_IFREG}), false)
}

func (*root) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = 0o555
	return 0
}

// file is the file that never answers a read. All else about it works.
type file struct{ fs.Inode }

var (
	_ fs.NodeGetattrer = (*file)(nil)
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeReader    = (*file)(nil)
)

func (*file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = 0o444
	out.Size = 1 // some programs do not read an empty file
	return 0
}

// Open asks for direct I/O: every read comes here, none waits in the page cache, which a kill would end.
func (*file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

// Read takes the request and keeps it. The context ends when the reader is killed; answering then would let the reader
// go, so it is not looked at.
func (*file) Read(context.Context, fs.FileHandle, []byte, int64) (fuse.ReadResult, syscall.Errno) {
	select {}
}
