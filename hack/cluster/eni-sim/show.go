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
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

func newShowCommand() *cobra.Command {
	var s store
	var output string
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Print which pod has which address, and which address is next",
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
	Pods []shownPod  `json:"pods"`
	Next *netip.Addr `json:"next"` // null when none is free
	Free int         `json:"free"`
}

type shownPod struct {
	Pod string `json:"pod"`
	record
}

func showJSON(w io.Writer, p *pool) error {
	s := shown{Pods: []shownPod{}, Free: len(p.Free)}
	for _, pod := range slices.Sorted(maps.Keys(p.Records)) {
		s.Pods = append(s.Pods, shownPod{Pod: pod, record: p.Records[pod]})
	}
	if len(p.Free) > 0 {
		s.Next = &p.Free[0]
	}
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(s)
}

func showTable(w io.Writer, p *pool) error {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "POD\tADDRESS\tSANDBOX\tSINCE")
	for _, pod := range slices.Sorted(maps.Keys(p.Records)) {
		r := p.Records[pod]
		fmt.Fprintf(table, "%s\t%s\t%.13s\t%s\n", pod, r.Address, r.Container, r.Since.Format(time.RFC3339))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	next := "none, the pool is exhausted"
	if len(p.Free) > 0 {
		next = p.Free[0].String()
	}
	_, err := fmt.Fprintf(w, "\nNext address: %s (%d of %d free)\n", next, len(p.Free), p.Size)
	return err
}
