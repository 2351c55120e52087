package main

import (
	"bytes"
	"net/netip"
	"testing"
	"time"
)

func TestShow(t *testing.T) {
	p := newPool(netip.MustParsePrefix("10.112.1.0/24"), 2)
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	empty := "POD   ADDRESS   SANDBOX   SINCE\n\nNext address: 10.112.1.2 (2 of 2 free)\n"
	if got := print(t, p, "table"); got != empty {
		t.Errorf("empty table:\n%s", got)
	}
	for pod, container := range map[string]string{"shop/web-0": "0123456789abcdef"} {
		if _, err := p.take(pod, container, "u1", since); err != nil {
			t.Fatal(err)
		}
	}
	table := `POD          ADDRESS      SANDBOX         SINCE
shop/web-0   10.112.1.2   0123456789abc   2026-01-02T03:04:05Z

Next address: 10.112.1.3 (1 of 2 free)
`
	if got := print(t, p, "table"); got != table {
		t.Errorf("table:\n%s\nwant:\n%s", got, table)
	}
	if _, err := p.take("shop/web-1", "fedcba", "", since); err != nil {
		t.Fatal(err)
	}
	json := `{
  "pods": [
    {
      "pod": "shop/web-0",
      "address": "10.112.1.2",
      "container": "0123456789abcdef",
      "podUID": "u1",
      "since": "2026-01-02T03:04:05Z"
    },
    {
      "pod": "shop/web-1",
      "address": "10.112.1.3",
      "container": "fedcba",
      "since": "2026-01-02T03:04:05Z"
    }
  ],
  "next": null,
  "free": 0
}
`
	if got := print(t, p, "json"); got != json {
		t.Errorf("json:\n%s\nwant:\n%s", got, json)
	}
}

func print(t *testing.T, p *pool, form string) string {
	t.Helper()
	var out bytes.Buffer
	show := showTable
	if form == "json" {
		show = showJSON
	}
	if err := show(&out, p); err != nil {
		t.Fatal(err)
	}
	return out.String()
}
