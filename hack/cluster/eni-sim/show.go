package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

func newShowCommand() *cobra.Command {
	var s store
	var output string
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Print which pod has which addresses, and which ones are next",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "" && output != "json" {
				return fmt.Errorf("--output %q is not json", output)
			}
			p, err := s.load()
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("no pod had an address yet: %w", err)
			}
			if err != nil {
				return err
			}
			if output == "json" {
				return showJSON(cmd.OutOrStdout(), p)
			}
			return showTable(cmd.OutOrStdout(), p)
		},
	}
	cmd.Flags().StringVar(&s.dir, "state-dir", "", "stateDir of the network configuration")
	cmd.Flags().StringVarP(&output, "output", "o", "", "json, or a table if not given")
	if err := cmd.MarkFlagRequired("state-dir"); err != nil {
		panic(err) // a wrong name above
	}
	return cmd
}

// shown is the JSON form.
type shown struct {
	Pods []shownPod `json:"pods"`
	IPv4 shownBlock `json:"ipv4"`
	IPv6 shownBlock `json:"ipv6"`
}

type shownBlock struct {
	Next *netip.Addr `json:"next"` // null when none is free
	Free int         `json:"free"`
}

func showBlock(b block) shownBlock {
	s := shownBlock{Free: len(b.Free)}
	if len(b.Free) > 0 {
		s.Next = &b.Free[0]
	}
	return s
}

type shownPod struct {
	Pod string `json:"pod"`
	record
}

func showJSON(w io.Writer, p *pool) error {
	s := shown{Pods: []shownPod{}, IPv4: showBlock(p.IPv4), IPv6: showBlock(p.IPv6)}
	for _, pod := range slices.Sorted(maps.Keys(p.Records)) {
		s.Pods = append(s.Pods, shownPod{Pod: pod, record: p.Records[pod]})
	}
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(s)
}

func showTable(w io.Writer, p *pool) error {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "POD\tADDRESSES\tSANDBOX\tSINCE")
	for _, pod := range slices.Sorted(maps.Keys(p.Records)) {
		r := p.Records[pod]
		fmt.Fprintf(table, "%s\t%s\t%.13s\t%s\n", pod, joined(r.addresses()), r.Container, r.Since.Format(time.RFC3339))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nNext address: %s\nNext IPv6 address: %s\n", nextOf(p.IPv4, p.Size), nextOf(p.IPv6, p.Size))
	return err
}

func nextOf(b block, size int) string {
	if len(b.Free) == 0 {
		return "none, the pool is exhausted"
	}
	return fmt.Sprintf("%s (%d of %d free)", b.Free[0], len(b.Free), size)
}

func joined(addrs []netip.Addr) string {
	var texts []string
	for _, addr := range addrs {
		texts = append(texts, addr.String())
	}
	return strings.Join(texts, ",")
}
