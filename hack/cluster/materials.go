package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"os"
	"runtime/debug"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// writeMaterials writes what a Go program is made of, by what the linker has written into it, as a CycloneDX bill of materials.
// It has no time and no serial number, so that the same program has the same one.
func writeMaterials(file string, info *debug.BuildInfo) error {
	var out bytes.Buffer
	if err := cdx.NewBOMEncoder(&out, cdx.BOMFileFormatJSON).SetPretty(true).Encode(materials(info)); err != nil {
		return err
	}
	return os.WriteFile(file, out.Bytes(), 0o644)
}

func materials(info *debug.BuildInfo) *cdx.BOM {
	components := []cdx.Component{{
		BOMRef: "pkg:golang/std@" + strings.TrimPrefix(info.GoVersion, "go"), Type: cdx.ComponentTypeLibrary,
		Name: "std", Version: strings.TrimPrefix(info.GoVersion, "go"), PackageURL: "pkg:golang/std@" + strings.TrimPrefix(info.GoVersion, "go"),
	}}
	for _, module := range info.Deps {
		if module.Replace != nil {
			module = module.Replace
		}
		components = append(components, moduleComponent(module, cdx.ComponentTypeLibrary))
	}
	program := moduleComponent(&info.Main, cdx.ComponentTypeApplication)
	bom := cdx.NewBOM()
	bom.Metadata, bom.Components = &cdx.Metadata{Component: &program}, &components
	return bom
}

func moduleComponent(module *debug.Module, kind cdx.ComponentType) cdx.Component {
	url := "pkg:golang/" + module.Path + "@" + module.Version
	c := cdx.Component{BOMRef: url, Type: kind, Name: module.Path, Version: module.Version, PackageURL: url}
	// The sum of go.sum is the SHA-256 of a list of the module's files and theirs (golang.org/x/mod/sumdb/dirhash, Hash1).
	if sum, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(module.Sum, "h1:")); err == nil && len(sum) > 0 {
		c.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(sum)}}
	}
	return c
}
