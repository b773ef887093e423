"""BANKING77: what customers ask a bank, 77 classes; 10,003 questions and 3,080 for testing."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from fedlora_jax.data import record_files
from fedlora_jax.names import lookup

CLASSES = (
    "activate_my_card age_limit apple_pay_or_google_pay atm_support automatic_top_up "
    "balance_not_updated_after_bank_transfer balance_not_updated_after_cheque_or_cash_deposit "
    "beneficiary_not_allowed cancel_transfer card_about_to_expire card_acceptance card_arrival "
    "card_delivery_estimate card_linking card_not_working card_payment_fee_charged "
    "card_payment_not_recognised card_payment_wrong_exchange_rate card_swallowed "
    "cash_withdrawal_charge cash_withdrawal_not_recognised change_pin compromised_card "
    "contactless_not_working country_support declined_card_payment declined_cash_withdrawal "
    "declined_transfer direct_debit_payment_not_recognised disposable_card_limits "
    "edit_personal_details exchange_charge exchange_rate exchange_via_app "
    "extra_charge_on_statement failed_transfer fiat_currency_support "
    "get_disposable_virtual_card get_physical_card getting_spare_card getting_virtual_card "
    "lost_or_stolen_card lost_or_stolen_phone order_physical_card passcode_forgotten "
    "pending_card_payment pending_cash_withdrawal pending_top_up pending_transfer pin_blocked "
    "receiving_money Refund_not_showing_up request_refund reverted_card_payment? "
    "supported_cards_and_currencies terminate_account top_up_by_bank_transfer_charge "
    "top_up_by_card_charge top_up_by_cash_or_cheque top_up_failed top_up_limits top_up_reverted "
    "topping_up_by_card transaction_charged_twice transfer_fee_charged transfer_into_account "
    "transfer_not_received_by_recipient transfer_timing unable_to_verify_identity "
    "verify_my_identity verify_source_of_funds verify_top_up virtual_card_not_working "
    "visa_or_mastercard why_verify_identity wrong_amount_of_cash_received "
    "wrong_exchange_rate_for_cash_withdrawal"
).split()

_FILES = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data"


class Banking77(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of Casanueva et al. (NLP4ConvAI 2020, arXiv:2003.04807); needs no TensorFlow.

    Splits `train` and `test`, with `text` and `label`. Classes are numbered in the order of their
    names, as elsewhere.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    url_infos: dict[str, Any] = {}  # no checksum is published

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                }
            ),
            supervised_keys=("text", "label"),
            homepage="https://github.com/PolyAI-LDN/task-specific-datasets",
            license="CC BY 4.0",
        )

    def _split_generators(self, manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        files = manager.download({split: f"{_FILES}/{split}.csv" for split in ("train", "test")})
        return {split: self._generate_examples(path) for split, path in files.items()}

    def _generate_examples(self, path: Any) -> Iterator[tuple[int, dict[str, str]]]:
        for number, record in enumerate(record_files.read(path, kind=".csv")):
            fields = record_files.strings(record, ("text", "category"))
            try:
                lookup(dict.fromkeys(CLASSES), fields["category"], "class")
            except ValueError as error:
                raise ValueError(f"{record.name}: {error}") from None
            yield number, {"text": fields["text"], "label": fields["category"]}
