package egress

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// Parse reads rules from a text: one of "allow RULE", "deny RULE", "default allow" and "default deny" on a line, and comments
// that begin with #. An error names the line.
func Parse(text io.Reader) (Rules, error) {
	var rules Rules
	lines := bufio.NewScanner(text)
	for number := 1; lines.Scan(); number++ {
		line, _, _ := strings.Cut(lines.Text(), "#")
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if err := rules.addLine(words); err != nil {
			return Rules{}, fmt.Errorf("line %d: %w", number, err)
		}
	}
	if err := lines.Err(); err != nil {
		return Rules{}, err
	}
	return rules, nil
}

func (r *Rules) addLine(words []string) error {
	if len(words) != 2 {
		return fmt.Errorf("%d words; write allow or deny and one rule, or default allow or default deny", len(words))
	}
	if words[0] == "default" && (words[1] == "allow" || words[1] == "deny") {
		r.DenyOthers = words[1] == "deny"
		return nil
	}
	rule, err := ParseRule(words[1])
	if err != nil {
		return err
	}
	switch words[0] {
	case "allow":
		r.Allow = append(r.Allow, rule)
	case "deny":
		r.Deny = append(r.Deny, rule)
	default:
		return fmt.Errorf("%.20q is unknown; write allow, deny or default", words[0])
	}
	return nil
}
